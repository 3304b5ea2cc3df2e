"""Settings: built-in default < config.py < MIGRENA_* variable < flag."""

from __future__ import annotations

import dataclasses
import io
import re
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

import migrena
from conftest import REPOSITORY
from migrena import Screen, Settings, UsageError, config_names, merge_settings, parser, read_call, read_config
from unit.makers import UUID, a_screen

# For each setting: what may be written for it, and what that means. No two may mean the same, nor the default.
SAMPLES: dict[str, tuple[tuple[object, Any], ...]] = {
    "dst_name": (("a", "a"), ("b", "b"), ("c", "c")),
    "src_uid": ((UUID, UUID), (UUID.replace("1", "A"), UUID.replace("1", "a")), (UUID.replace("-", ""), UUID)),
    "needed_for": ((UUID, UUID), (UUID.replace("1", "A"), UUID.replace("1", "a")), (UUID.replace("-", ""), UUID)),
    "run_of": ((UUID, UUID), (UUID.replace("1", "A"), UUID.replace("1", "a")), (UUID.replace("-", ""), UUID)),
    "extra_args": (({"a": 1}, {"a": 1}), ("{'b': 1}", {"b": 1}), ('{"c": 1}', {"c": 1})),
    "start_after": (("src", "src"), ("dst", "dst"), ("all", "all")),
    "limit_rate": ((5, "5"), ("6K", "6144"), ("08:00-18:00=20M,7M", f"08:00-18:00={20 * 1024**2},{7 * 1024**2}")),
    "cutover_at": (("2030-01-02T03:04:05+00:00", "2030-01-02T03:04:05+00:00"), ("2030-01-02 03:04 UTC", "2030-01-02T03:04:00+00:00"),
                   ("2030-01-02 03:04 +01:00", "2030-01-02T02:04:00+00:00")),
    "answers": ((["tcp:22"], ("tcp:22",)), ("console:a,b", ("console:a,b",)), (["tcp:22", "command:true"], ("tcp:22", "command:true"))),
    "transport": (("nbd", "nbd"), ("qemu", "qemu"), ("nbd", "nbd")),
    "compress": (("on", "on"), ("off", "off"), ("on", "on")),
    "nbd_server_port": ((2700, range(2700, 2701)), ("2701", range(2701, 2702)), ("2702-2703", range(2702, 2704))),
    "nbd_device": (("/dev/nbd1", "/dev/nbd1"), ("/dev/nbd2", "/dev/nbd2"), ("/dev/nbd3", "/dev/nbd3")),
    "disk_path": (("/a/%s", "/a/%s"), ("/b/%s", "/b/%s"), ("/c/%s", "/c/%s")),
    "hosts": (({"a": "b"}, {"a": migrena.HostEntry("b")}), ("{'c': 'd'}", {"c": migrena.HostEntry("d")}),
              ({"e": "f"}, {"e": migrena.HostEntry("f")})),
    "images": ((["a"], ("a",)), ("b", ("b",)), (["c", "d"], ("c", "d"))),
    "disks": ((["a"], ("a",)), ("b", ("b",)), ("c,d", ("c", "d"))),
    "volume_type": (({"a": "b"}, {"a": "b"}), ("{'c': 'd'}", {"c": "d"}), ("e=f,g=h", {"e": "f", "g": "h"})),
    "network": (({"a": "b"}, {"a": "b"}), ("{'c': 'd'}", {"c": "d"}), (["e=f", "g=h"], {"e": "f", "g": "h"})),
    "types": ((["a"], ("a",)), ("b", ("b",)), ("c,d", ("c", "d"))),
    "files": ((["a"], ("a",)), ("b,c", ("b,c",)), (["d", "e"], ("d", "e"))),
    "floating_ip": (("new", "new"), ("keep", "keep"), ("new", "new")),
    "disk_format": (("raw", "raw"), ("qcow2", "qcow2"), ("vmdk", "vmdk")),
    "sudo": (("yes", "yes"), ("no", "no"), ("yes", "yes")),
    "chunk": (("1M", 1024**2), ("2M", 2 * 1024**2), ("3M", 3 * 1024**2)),
    "tls": ((False, False), ("no", False), (False, False)),
    "verify": ((False, False), ("0", False), (False, False)),
}
ROWS = {row.name: row for row in dataclasses.fields(Settings) if row.name != "per_side"}


def samples(name: str) -> tuple[tuple[object, Any], ...]:
    """Three things to write for a setting, with what they mean."""
    if name in SAMPLES:
        return SAMPLES[name]
    default = getattr(Settings(), name)
    if isinstance(default, bool):
        return ((True, True), ("yes", True), (True, True))
    if isinstance(default, int):
        return ((31, 31), ("32", 32), (33, 33))
    return SAMPLES["extra_args"] if isinstance(default, dict) else SAMPLES["dst_name"]


@pytest.mark.parametrize("name", ROWS)
def test_a_flag_wins_over_a_variable_wins_over_config_wins_over_the_default(name: str) -> None:
    (in_config, from_config), (in_variable, from_variable), (in_flag, from_flag) = samples(name)
    variable = {f"MIGRENA_{name.upper()}": str(in_variable)}
    assert getattr(merge_settings({}, {}, {name: in_config}), name) == from_config != getattr(Settings(), name)
    assert getattr(merge_settings({}, variable, {name: in_config}), name) == from_variable != getattr(Settings(), name)
    if ROWS[name].metadata["flags"]:
        assert getattr(merge_settings({name: in_flag}, variable, {name: in_config}), name) == from_flag


def test_settling_nothing_gives_the_defaults() -> None:
    assert merge_settings({}, {"MIGRENA_UNHEARD_OF": "x", "PATH": "/bin"}, {}) == Settings()


@pytest.mark.parametrize(("flags", "environment", "config", "complaint"), [
    ({"limit_rate": "fast"}, {}, {}, "--limit-rate: 'fast' is not a size"),
    ({}, {"MIGRENA_LIMIT_RATE": "fast"}, {}, "MIGRENA_LIMIT_RATE: 'fast' is not a size"),
    ({}, {}, {"limit_rate": "fast"}, "LIMIT_RATE in config.py: 'fast' is not a size"),
    ({}, {}, {"transport": "quemu"}, r"TRANSPORT in config.py: 'quemu' is not one of auto, nbd, qemu; did you mean qemu\?"),
    ({"compress": "on"}, {}, {"transport": "nbd"}, "--compress on needs the transport qemu"),
    ({"warm": True}, {}, {"transport": "nbd"}, "--warm needs the transport qemu"),
    ({"volume_type": "fast"}, {}, {}, "--volume-type: 'fast' is not SRC=DST"),
    ({}, {}, {"volume_type": {"ssd": 1}}, "VOLUME_TYPE in config.py: {'ssd': 1} is not SRC=DST"),
    ({}, {}, {"hosts": {"cmp1": {"port": "ssh"}}, "path": "/etc/mine.py"},
     "HOSTS in /etc/mine.py: .* has for cmp1 as port 'ssh', which is not a TCP port"),
    ({"answers": ["tcp:ssh"]}, {}, {}, r"--await: \['tcp:ssh'\] 'tcp:ssh': 'ssh' is not a whole number above 0"),
    ({"max_downtime": "soon"}, {}, {}, "--max-downtime: 'soon' is not a time; write it as 30, 30s, 5m or 2h"),
    ({}, {}, {"chunk": "1K"}, "CHUNK: 1024 is not a multiple of 1 MiB"),
    ({}, {}, {"chunk": 1024**2 + 1}, "CHUNK: 1048577 is not a multiple of 1 MiB"),
    ({}, {}, {"chunk": 0}, "CHUNK: 0 is not a multiple of 1 MiB"),
    ({}, {}, {"nbd_device": "/dev/sda"}, "NBD_DEVICE in config.py: '/dev/sda' is not a /dev/nbdN"),
    ({}, {}, {"nbd_device": "/dev/nbd0p1"}, "NBD_DEVICE in config.py: '/dev/nbd0p1' is not a /dev/nbdN"),
    ({}, {}, {"nbd_device": "nbd0"}, "NBD_DEVICE in config.py: 'nbd0' is not a /dev/nbdN"),
    ({}, {}, {"nbd_server_port": 0}, "NBD_SERVER_PORT in config.py: 0 is not a TCP port"),
    ({}, {}, {"stall_timeout": "soon"}, "STALL_TIMEOUT in config.py: 'soon' "),
    ({}, {}, {"stall_timeout": None}, "STALL_TIMEOUT in config.py: None "),
    ({}, {}, {"stall_timeout": 0}, "STALL_TIMEOUT"),
    ({}, {}, {"stall_timeout": -5}, "STALL_TIMEOUT"),
    ({"extra_args": "[1]"}, {}, {}, "--extra-args: '\\[1\\]' is not a dictionary"),
    ({"start_after": "both"}, {}, {}, "--start-after: 'both' is not one of all, src, dst"),
])
def test_a_value_that_cannot_be_is_refused_with_the_place_it_came_from(
        flags: dict[str, object], environment: dict[str, str], config: dict[str, object], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        merge_settings(flags, environment, config)
    assert caught.value.exit_code == 2


def written(folder: Path, content: str) -> Path:
    path = folder / "config.py"
    path.write_text(content)
    return path


def test_config_gives_its_capital_names_and_nothing_else(tmp_path: Path) -> None:
    content = "import os\nfrom pathlib import Path\nhere = 1\n_PRIVATE = 2\nTRANSPORT = 'nbd'\nCHUNK = 4 * 1024**2\ndef helper(): pass\n"
    assert read_config(written(tmp_path, content)) == {"transport": "nbd", "chunk": 4 * 1024**2}


def test_an_unknown_setting_is_answered_with_the_known_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"config.py: unknown setting NBD_SERVR_PORT; did you mean NBD_SERVER_PORT\?") as caught:
        read_config(written(tmp_path, "NBD_SERVR_PORT = 1\n"))
    assert "DISK_PATH" in caught.value.reasons[0].way_out


@pytest.mark.parametrize("name", ["SRC_UID", "DST_NAME", "EXTRA_ARGS", "DRY_RUN", "START_AFTER", "ROOT_ONLY"])
def test_what_belongs_to_one_run_cannot_stand_in_config(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=f"unknown setting {name}"):
        read_config(written(tmp_path, f"{name} = ''\n"))


def test_a_syntax_error_is_reported_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"config\.py, line 2: "):
        read_config(written(tmp_path, "CHUNK = 1\nTRANSPORT = = 'nbd'\n"))


@pytest.mark.parametrize(("content", "complaint"), [
    ("X = 1/0", "ZeroDivisionError: division by zero"), ("import nothing_like_it", "ModuleNotFoundError"), ("raise SystemExit(7)", "config.py"),
    ("CHUNK = chunk", "NameError: name 'chunk' is not defined"),
])
def test_a_mishap_in_config_is_reported_as_its_fault(tmp_path: Path, content: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        read_config(written(tmp_path, content))


def test_config_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    path.write_bytes(b"\xff\xfe\x00CHUNK")
    with pytest.raises(UsageError, match=re.escape(str(path))):
        read_config(path)


def test_config_is_loaded_by_its_path_and_never_by_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoy = tmp_path / "elsewhere"
    decoy.mkdir()
    written(decoy, "TRANSPORT = 'nbd'\n")
    monkeypatch.syspath_prepend(str(decoy))
    monkeypatch.chdir(decoy)
    assert read_config(written(tmp_path, "TRANSPORT = 'qemu'\n")) == {"transport": "qemu"}
    assert "config" not in sys.modules


def test_the_source_has_no_import_of_config() -> None:
    assert not re.search(r"^\s*(import|from)\s+config\b", (REPOSITORY / "migrena.py").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("mode", "warns"), [(0o600, False), (0o640, True), (0o644, True), (0o604, True)])
def test_a_config_with_a_password_that_others_can_read_gets_a_warning(tmp_path: Path, mode: int, warns: bool) -> None:
    path = written(tmp_path, "SRC_CREDS = {'auth_url': 'http://192.0.2.1:5000/v3', 'username': 'u', 'password': 'hunter2'}\n")
    path.chmod(mode)
    screen = a_screen(io.StringIO(), quiet=True)
    read_call(["-c", str(path), "-s", UUID, "-d", "new"], {}, screen)
    assert [str(path) in line and "chmod 600" in line for line in screen.warnings] == [True] * warns
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("creds", ["DST_CREDS = {'password': 'hunter2'}", "SRC_CREDS = {'application_credential_secret': 'hunter2'}",
                                   "SRC_CREDS = \"{'api_key': 'hunter2'}\""])
def test_the_warning_comes_for_either_cloud_and_any_kind_of_secret(tmp_path: Path, creds: str) -> None:
    path = written(tmp_path, creds)
    path.chmod(0o644)
    screen = a_screen(io.StringIO(), quiet=True)
    read_call(["-c", str(path), "-s", UUID, "-d", "new"], {}, screen)
    assert len(screen.warnings) == 1


def test_long_names_are_the_ones_that_users_know() -> None:
    flags = {flag for action in parser()._actions for flag in action.option_strings}
    assert flags >= {"--src-uid", "--src-uuid", "--dst-name", "--flavor", "--image-id", "--extra-args", "--start-after", "--config", "--dry-run",
                     "-s", "-d", "-f", "-i", "-e", "-a", "-c", "-n", "-v", "-q", "--json", "--debug", "--transport", "--no-tls",
                     "--limit-rate", "--no-verify", "--src-cloud", "--dst-cloud", "--root-only"}


@pytest.mark.parametrize(("words", "meant"), [([], ""), (["-a"], "all"), (["-a", "dst"], "dst"), (["--start-after", "src,dst"], "all")])
def test_a_alone_means_all_and_without_it_nothing_is_started(tmp_path: Path, words: list[str], meant: str) -> None:
    path = written(tmp_path, "")
    settings = read_call(["-c", str(path), "-s", UUID, "-d", "new", *words], {}, Screen(stream=io.StringIO())).settings()
    assert settings.start_after == meant


WORDS = {"status": [], "resume": ["RUN"], "rollback": ["RUN"], "image": ["-i", "web"], "live-migrate": ["--host-map", "map.json"],
         "export": ["networks"], "import": ["resources"]}
BEFORE: list[list[str]] = [[], ["-v"], ["-q", "--json"], ["-vq"], ["--debug"], ["--log-file", "/tmp/log"],
                           ["--log-file=status"], ["--log-file", "status"]]


def called(path: Path, *words: str) -> migrena.Call:
    """What is asked for with these words and this config."""
    return read_call(words, {"MIGRENA_CONFIG": str(path)}, Screen(stream=io.StringIO()))


def test_every_subcommand_is_among_those_that_are_tried_with_options_before_it() -> None:
    assert WORDS.keys() == migrena.SUBCOMMANDS.keys() - {"copy"}
    common = {flag for row in ROWS.values() if migrena.SUBCOMMANDS.keys() <= {*row.metadata["of"]} for flag in row.metadata["flags"]}
    assert common == {"-v", "--verbose", "-q", "--quiet", "--json", "--debug", "--log-file"}


@pytest.mark.parametrize("words", BEFORE)
@pytest.mark.parametrize("job", WORDS)
def test_common_options_mean_the_same_before_a_subcommand_and_after_it(tmp_path: Path, job: str, words: list[str]) -> None:
    path = written(tmp_path, "")
    assert called(path, *words, job, *WORDS[job]) == called(path, job, *WORDS[job], *words)
    assert called(path, *words, job, *WORDS[job]).subcommand == job


@pytest.mark.parametrize("words", [["-c", "FILE", "status"], ["status", "-c", "FILE"], ["--config=FILE", "-v", "status"], ["-cFILE", "status", "-v"]])
def test_a_config_may_be_named_before_a_subcommand_and_after_it(tmp_path: Path, words: list[str]) -> None:
    path = written(tmp_path, f"STATE_FOLDER = {str(tmp_path)!r}\n")
    call = read_call([word.replace("FILE", str(path)) for word in words], {}, Screen(stream=io.StringIO()))
    assert (call.subcommand, call.settings().state_folder) == ("status", str(tmp_path))


@pytest.mark.parametrize("words", [["-s", UUID, "-d", "status"], ["-d", "rollback", "-s", UUID], ["-d", "image", "-i", "image", "-s", UUID],
                                   ["-i", "image", "-s", UUID, "-d", "x"], ["--log-file", "status", "-s", UUID, "-d", "x"],
                                   ["-f", "resume", "-q", "-s", UUID, "-d", "status"]])
def test_an_option_s_value_is_not_a_subcommand(tmp_path: Path, words: list[str]) -> None:
    assert called(written(tmp_path, ""), *words).subcommand == "copy"


@pytest.mark.parametrize("words", [["-s", UUID, "status"], ["-d", "new", "-q", "rollback", "RUN"], ["stray", "status"], ["-c"],
                                   ["-q", "status", "--tls"], ["--quiet=yes", "status"]])
def test_an_option_that_a_subcommand_does_not_know_is_wrong_before_it_too(
        tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(UsageError, match=r"unrecognized|expected one argument|explicit argument"):
        called(written(tmp_path, ""), *words)


def names_in(content: str) -> set[str]:
    """The settings that a config.py sets, or shows behind a #."""
    return set(re.findall(r"^(?:#\s?)?([A-Z][A-Z_]+)\s*=", content, re.MULTILINE))


def test_every_setting_stands_in_config_and_none_besides() -> None:
    assert names_in((REPOSITORY / "config.py").read_text()) == set(config_names())


def test_control_a_config_that_lacks_a_setting_is_noticed() -> None:
    assert names_in("CHUNK = 1\n# TRANSPORT = 'auto'\n#SUDO = 1\nlower = 2\n") == {"CHUNK", "TRANSPORT", "SUDO"} != set(config_names())


def test_config_is_shipped_with_the_defaults() -> None:
    shipped = merge_settings({}, {}, read_config(REPOSITORY / "config.py"))
    filled_in = {"src_creds", "dst_creds", "hosts"}
    different = {name for name in ROWS if getattr(shipped, name) != getattr(Settings(), name)}
    assert different <= filled_in


def missing_in_readme(content: str) -> list[str]:
    """Flags and settings that README's tables do not show."""
    rows = "\n".join(line for line in content.splitlines() if line.lstrip().startswith("|"))
    wanted = {flag for row in ROWS.values() for flag in row.metadata["flags"]} | set(config_names())
    return sorted(word for word in wanted if f"`{word}" not in rows and f"`{word}`" not in rows)


def test_every_flag_and_setting_stands_in_a_table_of_readme() -> None:
    assert missing_in_readme((REPOSITORY / "README.md").read_text()) == []


def test_control_a_flag_that_readme_lacks_is_noticed() -> None:
    assert "--no-tls" in missing_in_readme("| `-s`, `--src-uid` | x |\n\n--no-tls in the text only\n")


def test_readme_tells_every_exit_code() -> None:
    content = (REPOSITORY / "README.md").read_text()
    assert all(re.search(rf"\|\s*`?{code}`?\s*\|", content) for code in ("0", "1", "2", "3", "4", "128.{0,3}n"))


def test_what_is_set_for_one_side_alone_wins_over_the_common_value_there() -> None:
    config = {"hosts": {"compute-1": "192.0.2.1"}, "dst_hosts": {"compute-1": "192.0.2.2"}, "disk_path": "/a/%s/disk"}
    settings = merge_settings({}, {"MIGRENA_SRC_DISK_PATH": "/b/%s/disk"}, config)
    assert [settings.of(side).hosts["compute-1"].address for side in ("src", "dst")] == ["192.0.2.1", "192.0.2.2"]
    assert [settings.of(side).disk_path for side in ("src", "dst")] == ["/b/%s/disk", "/a/%s/disk"]


def test_a_value_for_one_side_is_read_as_strictly_as_the_common_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"DST_SSH_PORT in config\.py: 'x' is not a TCP port"):
        merge_settings({}, {}, {"dst_ssh_port": "x"})
    path = tmp_path / "config.py"
    path.write_text("SRC_HOST = {}")
    with pytest.raises(UsageError, match="did you mean SRC_HOSTS"):
        read_config(path)
