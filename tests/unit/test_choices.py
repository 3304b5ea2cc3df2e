"""-f and -i take a name or an id; left out, they are matched from the source. What is ambiguous is refused with the candidates."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import requests
from novaclient import api_versions, exceptions
from novaclient.v2.servers import ServerManager

from migrena import Cloud, CloudError, Flavor, Image, Reason, Refused, pick_flavor, pick_image, until_taken
from unit.makers import UUID, a_flavor, a_server, an_image

SMALL = a_flavor(id="1", name="small")
LARGE = a_flavor(id="2", name="large", vcpus=4, ram=8192, disk=80)
TWIN = a_flavor(id="3", name="small")
TRICKY = a_flavor(id="small", name="9")  # its id is another one's name
DEBIAN, UBUNTU = an_image(id="a", name="debian"), an_image(id="b", name="ubuntu", os_hash="hash-2", checksum="sum-2")


def refusal(caught: pytest.ExceptionInfo[Refused]) -> Reason:
    """The one reason."""
    (reason,) = caught.value.reasons
    assert caught.value.exit_code == 3
    return reason


@pytest.mark.parametrize(("wanted", "flavors", "picked"), [
    ("small", [SMALL, LARGE], SMALL), ("2", [SMALL, LARGE], LARGE), ("3", [SMALL, TWIN], TWIN), ("small", [SMALL, TRICKY], TRICKY),
    ("9", [SMALL, TRICKY], TRICKY),
])
def test_a_flavor_is_taken_by_its_id_and_else_by_its_name(wanted: str, flavors: list[Flavor], picked: Flavor) -> None:
    assert pick_flavor(wanted, flavors, None) == picked


def test_an_ambiguous_flavor_is_refused_with_the_candidates() -> None:
    with pytest.raises(Refused) as caught:
        pick_flavor("small", [SMALL, LARGE, TWIN], a_server())
    assert "2 flavors are named 'small': 1, 3" in refusal(caught).problem
    assert "-f" in refusal(caught).way_out


def test_a_missing_flavor_is_refused_with_the_nearest() -> None:
    with pytest.raises(Refused) as caught:
        pick_flavor("smal", [LARGE, SMALL], a_server())
    assert "there is no flavor 'smal'" in refusal(caught).problem
    assert "nearest: small" in refusal(caught).way_out


def test_a_cloud_without_flavors_says_so() -> None:
    with pytest.raises(Refused) as caught:
        pick_flavor("small", [], None)
    assert "none" in refusal(caught).way_out


def test_a_flavor_that_is_left_out_is_the_one_of_the_same_name() -> None:
    other = a_flavor(id="7", name="same sizes")
    assert pick_flavor("", [other, LARGE, SMALL], a_server(flavor=a_flavor(id="", name="small", vcpus=99))) == SMALL


@pytest.mark.parametrize("different", [{"vcpus": 2}, {"ram": 513}, {"disk": 11}, {"ephemeral": 1}, {"swap": 1}])
def test_a_flavor_that_is_left_out_is_else_the_only_one_of_the_same_sizes(different: dict[str, int]) -> None:
    wanted = a_flavor(id="", name="gone by now")
    assert pick_flavor("", [LARGE, a_flavor(id="4", name="almost", **different), SMALL], a_server(flavor=wanted)) == SMALL
    with pytest.raises(Refused) as caught:
        pick_flavor("", [LARGE, a_flavor(id="4", name="almost", **different)], a_server(flavor=wanted))
    assert "'gone by now'" in refusal(caught).problem


def test_two_flavors_of_the_same_sizes_are_refused_with_both() -> None:
    with pytest.raises(Refused) as caught:
        pick_flavor("", [SMALL, TWIN], a_server(flavor=a_flavor(id="", name="gone")))
    assert "(1)" in refusal(caught).problem and "(3)" in refusal(caught).problem


def test_a_source_flavor_of_unknown_sizes_matches_nothing_by_sizes() -> None:
    unknown = Flavor("", 0, 0, 0, 0, 0)
    with pytest.raises(Refused):
        pick_flavor("", [Flavor("zero", 0, 0, 0, 0, 0, "0")], a_server(flavor=unknown))


class Nova:
    """Its flavors are what the test says, its one key pair is `mine`, and it counts how often it was asked."""

    def __init__(self, *flavors: dict[str, Any]) -> None:
        self.asked = 0
        self.servers = ServerManager(SimpleNamespace(api_version=api_versions.APIVersion("2.96")))
        self.flavors = SimpleNamespace(list=lambda is_public: self.listed(flavors))
        self.keypairs = SimpleNamespace(get=self.key)

    def listed(self, flavors: Sequence[dict[str, Any]]) -> list[SimpleNamespace]:
        self.asked += 1
        return [SimpleNamespace(to_dict=lambda told=told: told) for told in flavors]

    def key(self, name: str) -> None:
        if name != "mine":
            answer = SimpleNamespace(status_code=404 if name == "theirs" else 503, headers={})
            raise exceptions.from_response(answer, {}, "")


def test_a_cell_that_is_away_is_an_outage_and_a_page_of_a_proxy_too() -> None:
    cloud = Cloud.__new__(Cloud)
    cloud.label = "source"
    with pytest.raises(CloudError, match="cannot reach the cell of server one") as caught:
        cloud.read({"id": "one", "status": "UNKNOWN", "tenant_id": "p", "created": "2026-11-20"})
    assert caught.value.code == 503 and caught.value.is_temporary
    with pytest.raises(CloudError) as told, cloud.translating("list ports"):
        raise requests.exceptions.JSONDecodeError("Expecting value", "<html>", 0)
    assert told.value.code == 502 and told.value.is_temporary and not told.value.is_refusal


def test_what_was_not_taken_for_haste_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migrena.CLAIM_PAUSE", 0)
    answers = iter([429, 429, 0, 503])

    def ask() -> str:
        if code := next(answers):
            raise CloudError("told", code=code)
        return "made"

    assert until_taken(ask) == "made"
    with pytest.raises(CloudError) as caught:
        until_taken(ask)
    assert not caught.value.is_refusal and CloudError("", code=429).is_refusal and CloudError("", code=404).is_refusal


def a_cloud(nova: Nova) -> Cloud:
    """A cloud that is this Nova alone."""
    cloud: Any = object.__new__(Cloud)
    cloud.label, cloud._nova, cloud._version = "some", nova, (2, 96)
    return cast(Cloud, cloud)


TOLD = {"id": UUID, "name": "web", "status": "ACTIVE"}
SIZES = {"vcpus": 1, "ram": 512, "disk": 10, "ephemeral": 0, "swap": 0}


@pytest.mark.parametrize(("name", "picked"), [("small", SMALL), ("gone, or private by now", SMALL), ("large", LARGE)])
def test_hazard_30_a_source_flavor_that_is_gone_is_matched_by_what_the_instance_itself_says(
        name: str, picked: Flavor) -> None:
    nova, told = Nova(), {**SIZES, "original_name": name, "extra_specs": {"a": "1"}}  # as since 2.47
    server = a_cloud(nova).read({**TOLD, "flavor": told, "key_name": "theirs"})
    assert server.key == "theirs"
    assert (server.flavor.sizes, server.flavor.extra_specs) == (SMALL.sizes, {"a": "1"})
    assert pick_flavor("", [LARGE, SMALL], server) == picked
    assert nova.asked == 0


@pytest.mark.parametrize("id", ["there", "gone"])
def test_hazard_30_a_source_flavor_that_is_gone_from_an_old_nova_is_reported_to_be_that(id: str) -> None:
    nova = Nova({"id": "there", "name": "small", **SIZES})
    server = a_cloud(nova).read({**TOLD, "flavor": {"id": id}})  # as before 2.47
    if id == "there":
        assert pick_flavor("", [LARGE, SMALL], server) == SMALL
        return
    with pytest.raises(Refused, match="no flavor to be matched with the source's, which is gone") as caught:
        pick_flavor("", [LARGE, SMALL], server)
    assert "-f" in refusal(caught).way_out
    assert pick_flavor("large", [LARGE, SMALL], server) == LARGE


@pytest.mark.parametrize(("key", "told"), [
    ("mine", ""), (None, ""), ("theirs", "the user of these credentials has no key pair 'theirs'")])
def test_hazard_30_a_key_pair_of_extra_arguments_that_is_somebody_else_s_is_refused_before_nova_does(
        key: str | None, told: str) -> None:
    assert a_cloud(Nova()).refuses({"key_name": key}) == told
    with pytest.raises(CloudError, match="show key pair"):
        a_cloud(Nova()).refuses({"key_name": "of which Nova does not tell"})


def test_no_flavor_is_matched_to_an_unknown_source() -> None:
    with pytest.raises(Refused, match="while the source is unknown"):
        pick_flavor("", [SMALL], None)


@pytest.mark.parametrize(("wanted", "picked"), [("debian", DEBIAN), ("a", DEBIAN), ("b", UBUNTU), ("ubuntu", UBUNTU)])
def test_an_image_is_taken_by_its_id_and_else_by_its_name(wanted: str, picked: Image) -> None:
    assert pick_image(wanted, [UBUNTU, DEBIAN], None) == picked


def test_an_ambiguous_image_is_refused_with_the_ids() -> None:
    with pytest.raises(Refused) as caught:
        pick_image("debian", [DEBIAN, an_image(id="c", name="debian")], None)
    assert "a, c" in refusal(caught).problem
    assert "-i" in refusal(caught).way_out


def test_a_missing_image_is_refused_with_the_nearest() -> None:
    with pytest.raises(Refused) as caught:
        pick_image("debain", [UBUNTU, DEBIAN], None)
    assert "there is no image 'debain'" in refusal(caught).problem
    assert "nearest: debian" in refusal(caught).way_out


@pytest.mark.parametrize("status", ["queued", "saving", "deactivated", "killed"])
def test_an_image_that_is_not_active_is_refused(status: str) -> None:
    with pytest.raises(Refused, match=f"is {status}, not active"):
        pick_image("debian", [an_image(status=status)], None)


def test_an_image_that_is_left_out_is_the_one_with_the_same_hash() -> None:
    renamed = an_image(id="z", name="other name", checksum="")
    assert pick_image("", [UBUNTU, renamed], an_image(checksum="")) == renamed


def test_an_image_that_is_left_out_is_else_the_one_with_the_same_checksum() -> None:
    old = an_image(id="z", name="other name", os_hash="")
    assert pick_image("", [UBUNTU, old], DEBIAN) == old


def test_of_several_equal_images_the_one_of_the_same_name_is_taken() -> None:
    copy = an_image(id="z", name="a copy")
    assert pick_image("", [copy, DEBIAN, UBUNTU], an_image(id="elsewhere")) == DEBIAN


def test_images_without_any_digest_are_not_equal() -> None:
    with pytest.raises(Refused, match="there is no image with the content of the source's 'debian'"):
        pick_image("", [an_image(id="z", os_hash="", checksum="")], an_image(os_hash="", checksum=""))


def test_an_equal_image_that_is_not_active_is_not_taken() -> None:
    with pytest.raises(Refused, match="there is no image"):
        pick_image("", [an_image(status="queued")], DEBIAN)


def test_a_source_image_that_was_deleted_matches_none_and_the_way_out_is_to_name_one() -> None:
    with pytest.raises(Refused, match="the source's image is gone") as caught:
        pick_image("", [DEBIAN], None)
    assert "-i" in refusal(caught).way_out


def test_a_source_image_that_was_deleted_does_not_matter_where_one_is_named() -> None:
    assert pick_image("debian", [DEBIAN], None) == DEBIAN


def test_a_source_flavor_that_was_deleted_does_not_matter_where_one_is_named() -> None:
    assert pick_flavor("small", [SMALL], a_server(flavor=Flavor("", 0, 0, 0, 0, 0))) == SMALL
