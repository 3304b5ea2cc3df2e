"""What an image's bytes are held to on their way, and what forbids to carry one; the way itself is tried on real clouds."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import io
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from migrena import (
    DestinationFacts,
    FinalError,
    Image,
    ImagePlan,
    Refused,
    Screen,
    SourceFacts,
    Stream,
    Undo,
    carry_alone,
    converted,
    image_to_carry,
    lines_of_runs,
    pick_image,
    plan_image,
    refuse_image,
    wanted_images,
)
from unit.makers import some_settings

needs_qemu = pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is missing")
CONTENT = [b"one", b"two", b""]
SHA512, MD5 = (getattr(hashlib, name)(b"onetwo").hexdigest() for name in ("sha512", "md5"))


def told(**different: Any) -> Image:
    """An active image as Glance tells it."""
    return Image.of({"id": "1", "name": "debian", "status": "active", "disk_format": "qcow2", "container_format": "bare", "size": 6, "tags": [],
                     "os_hash_algo": "sha512", "os_hash_value": SHA512, "checksum": MD5, **different})


def a_stream(**different: Any) -> Stream:
    """Bytes that were read to their end."""
    shown: list[int] = []
    stream = Stream(iter(CONTENT), told(**different), "", shown.append)
    assert b"".join(iter(stream.read, b"")) == b"onetwo" and shown[-1] == stream.done == 6
    return stream


def test_bytes_are_proven_by_whatever_digest_a_glance_tells() -> None:
    assert a_stream().prove(told(), "source") == SHA512
    assert a_stream().prove(told(os_hash_algo=None, os_hash_value=None), "source") == MD5
    assert a_stream(os_hash_algo="unheard-of").prove(told(os_hash_algo="unheard-of"), "source") == MD5
    sha256 = hashlib.sha256(b"onetwo").hexdigest()
    assert a_stream(os_hash_algo="sha256").prove(told(os_hash_algo="sha256", os_hash_value=sha256), "source") == sha256


@pytest.mark.parametrize(("different", "words"), [({"os_hash_value": "0"}, "differs from that of the bytes read"),
                                                  ({"os_hash_algo": "sha3_512", "checksum": None}, "no usable digest"),
                                                  ({"os_hash_algo": None, "os_hash_value": None, "checksum": None}, "no usable digest")])
def test_bytes_that_differ_or_cannot_be_compared_are_not_a_copy(different: dict[str, Any], words: str) -> None:
    with pytest.raises(FinalError, match=words):
        a_stream().prove(told(**different), "destination")


def test_images_are_found_by_id_by_name_and_by_tag() -> None:
    here = [told(), told(id="2", name="twin"), told(id="3", name="twin", tags=["web"])]
    assert wanted_images(some_settings(images=("1", "debian")), here) == ([here[0]], [])
    assert wanted_images(some_settings(tag="web"), here) == ([here[2]], [])
    for asked, words in (({"images": ("twin",)}, "2 images are named 'twin': 2, 3"), ({"images": ("debina",)}, "no image 'debina'"),
                         ({"tag": "x"}, "tag 'x'")):
        ((reason,),) = (wanted_images(some_settings(**asked), here)[1],)
        assert words in reason.problem


def test_the_same_content_is_there_already_whatever_its_name_and_one_of_the_same_name_first() -> None:
    there = [told(id="8", name="other"), told(id="9")]
    assert plan_image(some_settings(), told(), there).there == "9"
    for half in ({"status": "queued"}, {"migrena_run": "R"}):
        assert plan_image(some_settings(), told(), [told(id="8", **half)]).there == ""
    assert plan_image(some_settings(disk_format="raw"), told(), there).there == ""


def test_images_with_equal_md5_and_different_os_hash_are_different() -> None:
    there = told(id="9", os_hash_value="0")
    assert not told().equals(there) and plan_image(some_settings(), told(), [there]).there == ""
    with pytest.raises(Refused, match="no image with the content"):
        pick_image("", [there], told())


@pytest.mark.parametrize(("one", "other", "are_equal"), [
    ({"checksum": "0"}, {}, True),  # the weaker digest is not asked
    ({"os_hash_value": None}, {}, True), ({"os_hash_value": None, "checksum": "0"}, {}, False),
    ({"os_hash_algo": "sha256"}, {}, True), ({"os_hash_algo": "sha256", "checksum": "0"}, {}, False),  # equal values of two algorithms prove nothing
    ({"os_hash_algo": "sha256", "os_hash_value": "0"}, {}, True), ({"checksum": None, "os_hash_value": None}, {}, False),
    ({"checksum": None, "os_hash_value": None}, {"checksum": None, "os_hash_value": None}, False),
    ({"checksum": None}, {"os_hash_value": None}, False)])
def test_the_strongest_digest_that_both_images_have_decides(one: dict[str, Any], other: dict[str, Any], are_equal: bool) -> None:
    assert told(**one).equals(told(**other)) is told(**other).equals(told(**one)) is are_equal


class Glance:
    """A stand-in for a Glance that holds images in memory; what any tenant can set is set by `properties`."""

    def __init__(self, *there: Image, content: bytes = b"") -> None:
        self.there, self.content, self.store, self.url = {image.id: image for image in there}, content, self, "http://keystone"

    def all(self) -> list[Image]:
        return list(self.there.values())

    def one(self, id: str) -> Image | None:
        return self.there.get(id)

    def download(self, id: str) -> Iterator[bytes]:
        yield self.content

    def make(self, **facts: Any) -> str:
        self.there["made"] = Image.of({"id": "made", "status": "queued", **facts})
        return "made"

    def describe(self, id: str, facts: dict[str, Any], *left_out: str) -> list[str]:
        self.there[id] = Image.of({key: value for key, value in {**self.there[id].facts, **facts}.items() if key not in left_out})
        return []

    def send(self, id: str, content: Any, size: int) -> None:
        digest = hashlib.sha512(b"".join(iter(content.read, b""))).hexdigest()
        self.describe(id, {"status": "active", "os_hash_algo": "sha512", "os_hash_value": digest})


def conversions(folder: Path) -> set[tuple[str, str]]:
    return {(line["source"], line["digest"]) for line in lines_of_runs(folder, "proven image")}


@needs_qemu
def test_a_converted_image_is_already_there_only_where_a_journal_proves_its_content(tmp_path: Path) -> None:
    """Anyone may call an image, shared or public, a conversion of another one: `source_uuid` is a property."""
    content = b"content".ljust(1 << 20, b"\0")
    image = told(os_hash_value=hashlib.sha512(content).hexdigest(), checksum=None, disk_format="raw", size=len(content))
    settings, folder = some_settings(disk_format="qcow2", work_folder=str(tmp_path)), tmp_path / "state"
    folder.mkdir()
    false = told(id="7", name="free", disk_format="qcow2", source_uuid="1", os_hash_value="0", visibility="public")
    glance, undo = Glance(false), Undo(Screen(stream=io.StringIO()))
    before = plan_image(settings, image, glance.all(), conversions(folder))
    assert before.there == ""
    clouds: Any = (Glance(image, content=content), glance)
    carry_alone(settings, folder, undo, clouds, before)
    assert plan_image(settings, image, glance.all(), conversions(folder)).there == "made"
    glance.describe("made", {}, "source_uuid")  # the property is not needed
    assert plan_image(settings, image, glance.all(), conversions(folder)).there == "made"
    elsewhere = plan_image(settings, image, glance.all(), conversions(tmp_path))
    assert elsewhere.there == ""
    (reason,) = refuse_image(settings, elsewhere, glance.all())
    assert "has other content or another format (made), or no journal here proves that it was converted from this one" in reason.problem
    assert list(refuse_image(settings, replace(elsewhere, name="again"), glance.all())) == []
    for altered in ({"os_hash_value": "0"}, {"disk_format": "raw"}):
        glance.describe("made", altered)
        assert plan_image(settings, image, glance.all(), conversions(folder)).there == ""


@pytest.mark.parametrize("form", [{"disk_format": "raw"}, {"disk_format": "iso"}, {"container_format": "ova"}])
def test_the_same_bytes_under_another_format_are_another_image(form: dict[str, Any]) -> None:
    there = told(id="9", **form)
    assert plan_image(some_settings(), told(), [there]).there == ""
    (reason,) = refuse_image(some_settings(), plan_image(some_settings(), told(), [there]), [there])
    assert "another format (9)" in reason.problem
    with pytest.raises(Refused, match="no image with the content"):
        pick_image("", [there], told())
    carried = image_to_carry(some_settings(copy_image=True), SourceFacts(None, image=told()), DestinationFacts(None, images=(there,)))
    assert carried and carried.disk_format == "qcow2"
    assert pick_image("", [there, told(id="8")], told()).id == "8"


def test_a_hidden_image_is_found_by_its_id_and_by_a_name_that_no_other_has() -> None:
    retired = told(id="2", os_hidden=True, os_hash_value="old", checksum="old", tags=["web"])
    lonely = told(id="3", name="lonely", os_hidden=True)
    here = [retired, told(tags=["web"]), lonely]
    for name, id in (("debian", "1"), ("2", "2"), ("lonely", "3")):
        assert [one.id for one in wanted_images(some_settings(images=(name,)), here)[0]] == [id]
        assert pick_image(name, here, None).id == id
    assert [one.id for one in wanted_images(some_settings(tag="web"), here)[0]] == ["1"]
    assert list(refuse_image(some_settings(), ImagePlan(told(), "debian", "qcow2"), [retired])) == []  # the name was given up
    assert plan_image(some_settings(), told(), [told(id="7", os_hidden=True), told(id="8", name="other")]).there == "8"
    assert pick_image("", [told(id="7", os_hidden=True)], told()).id == "7"


@pytest.mark.parametrize(("different", "there", "words"), [
    ({"status": "queued"}, [], "is queued, not active"), ({"img_signature": "x"}, [], "is signed"),
    ({"os_encrypt_key_id": "x"}, [], "is encrypted"), ({"cinder_encryption_key_id": "x"}, [], "is encrypted"),
    ({"kernel_id": "x"}, [], "kernel image"),
    ({}, [told(id="5", os_hash_value="x")], "has other content or another format (5)"),
    ({}, [told(id="5", os_hash_value="x", source_uuid="1", migrena_run="R")], "run R is carrying it")])
def test_what_forbids_to_carry_an_image_is_reported(different: dict[str, Any], there: list[Image], words: str) -> None:
    (reason,) = refuse_image(some_settings(), ImagePlan(told(**different), "debian", "qcow2"), there)
    assert words in reason.problem


def test_a_folder_without_room_for_both_forms_is_refused(tmp_path: Path) -> None:
    for folder, size, words in ((tmp_path, 2**62, "are needed"), (tmp_path / "none", 6, "cannot be used: No such file")):
        (reason,) = refuse_image(some_settings(work_folder=str(folder)), ImagePlan(told(size=size), "debian", "raw"), [])
        assert words in reason.problem and "--work-folder" in reason.way_out


def test_an_image_in_a_container_is_not_converted() -> None:
    (reason,) = refuse_image(some_settings(), ImagePlan(told(container_format="ova"), "debian", "raw"), [])
    assert "container format is ova" in reason.problem
    (reason,) = refuse_image(some_settings(), ImagePlan(told(disk_format="aki"), "debian", "raw"), [])
    assert "does not read aki" in reason.problem


def test_without_the_library_that_judges_images_none_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for oslo.utils before 7.3, whose imageutils is a module."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    (reason,) = refuse_image(some_settings(work_folder=str(tmp_path)), ImagePlan(told(), "debian", "raw"), [])
    assert "oslo.utils 7.3" in reason.problem and "requirements.txt" in reason.way_out


def convert(content: bytes, folder: Path, disk_format: str = "vmdk") -> bytes:
    """What an image with these bytes becomes as a raw one."""
    image = told(disk_format=disk_format, size=len(content))
    with converted(Stream(iter([content]), image, "", lambda done: None), ImagePlan(image, "x", "raw"), str(folder)) as made:
        return made.read_bytes()


def empty_vmdk(kind: str, extent: str) -> bytes:
    """A sparse VMDK of capacity 0, for which qemu looks up its descriptor where the data is."""
    descriptor = f'# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n{kind}\nRW 128 FLAT "{extent}" 0\n'
    header = struct.pack("<4sIIQQQQIQQQ", b"KDMV", 1, 3, 0, 128, 1, 20, 512, 0, 0, 128)
    return (header.ljust(512, b"\0") + descriptor.encode()).ljust(1 << 17, b"\0")


@needs_qemu
@pytest.mark.parametrize("kind", ['createType="monolithicFlat"', 'createtype="monolithicSparse"\ncreateType="monolithicFlat"'])
@pytest.mark.parametrize("is_absolute", [True, False])
def test_a_vmdk_without_capacity_brings_no_file_of_this_machine_into_an_image(tmp_path: Path, kind: str, is_absolute: bool) -> None:
    (tmp_path / "secret").write_bytes(b"secret".ljust(1 << 16, b"\0"))
    extent = str(tmp_path / "secret") if is_absolute else "given"
    with pytest.raises(FinalError, match="unsafe to convert"):
        convert(empty_vmdk(kind, extent), tmp_path)


@needs_qemu
@pytest.mark.parametrize("words", [("qcow2",), ("vmdk", "-o", "subformat=streamOptimized"), ("vmdk", "-o", "subformat=monolithicSparse"),
                                   ("vdi",), ("vpc",), ("vpc", "-o", "subformat=fixed,force_size"), ("vhdx",), ("parallels",), ("raw",)])
def test_an_image_of_one_file_is_converted_whatever_its_format(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "raw").write_bytes(b"content".ljust(1 << 20, b"\0"))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", *words, tmp_path / "raw", tmp_path / "image"], check=True)
    format = {"vpc": "vhd", "parallels": "ploop"}.get(words[0], words[0])
    assert convert((tmp_path / "image").read_bytes(), tmp_path, format).startswith(b"content")


@needs_qemu
@pytest.mark.parametrize("words", [("qcow2", "-b", "base", "-F", "raw"), ("qcow2", "-o", "data_file=data"),
                                   ("vmdk", "-o", "subformat=monolithicFlat"), ("vmdk", "-b", "base.vmdk", "-F", "vmdk")])
def test_an_image_that_names_a_further_file_is_not_converted(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "base").write_bytes(bytes(1 << 20))
    subprocess.run(["qemu-img", "create", "-q", "-f", "vmdk", tmp_path / "base.vmdk", "1M"], check=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", *words, "image", "1M"], check=True, cwd=tmp_path)
    with pytest.raises(FinalError, match="unsafe to convert"):
        convert((tmp_path / "image").read_bytes(), tmp_path, words[0])
