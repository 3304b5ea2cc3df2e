"""What a host answers is taken for what it is: banners and lines of wrappers are left out, and what has another form is shown."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from hosts.conftest import MakeCopy, Reach
from hosts.operators import Operator
from hosts.rig import Instance, MiB, base, same_guest
from hosts.test_commands import AWKWARD
from lab.hosts import Lab
from migrena import Host, HostError, disk_chain, free_space, pairs_of

BANNER = "echo '{\"Authorized\": \"use only\"}'; echo 'be warned' >&2; printf 'no line end'\n"


@contextlib.contextmanager
def file(lab: Lab, host: str, path: str, text: str, mode: str = "755") -> Iterator[None]:
    """A file of a host's that is put aside for the scope."""
    lab[host].run("sh", "-c", '[ ! -e "$1" ] || mv "$1" "$1.aside"; cat > "$1"; chmod "$2" "$1"', "sh", path, mode, input=text)
    try:
        yield
    finally:
        lab[host].run("sh", "-c", 'rm -f "$1"; [ ! -e "$1.aside" ] || mv "$1.aside" "$1"', "sh", path)


@pytest.fixture
def banners(lab: Lab) -> Iterator[None]:
    """Login shells that greet everybody, whether they are asked for a command or not."""
    with contextlib.ExitStack() as stack:
        for host in ("src", "dst"):
            for home in ("/root", "/home/operator", "/home/nosudo"):
                stack.enter_context(file(lab, host, f"{home}/.bashrc", BANNER, "644"))
        yield


@contextlib.contextmanager
def login_shell(lab: Lab, user: str, shell: str) -> Iterator[None]:
    """Another login shell for a user of the source's host."""
    passwd = lab["src"].run("cat", "/etc/passwd").stdout
    (line,) = (line for line in passwd.splitlines() if line.startswith(f"{user}:"))
    with file(lab, "src", "/etc/passwd", passwd.replace(line, f"{line.rpartition(':')[0]}:{shell}"), "644"):
        yield


@pytest.mark.usefixtures("banners")
def test_a_banner_of_the_login_shell_is_no_part_of_an_answer(lab: Lab, reach: Reach) -> None:
    for user in ("root", "operator"):
        host = reach("src", ssh_user=user)
        assert host.run("id", "-un") == host.work("id", "-un", stall=30) == "root\n"
        assert host.run("cat", stdin=b"fed\n") == "fed\n"
        assert host.nbd_address == lab["src"].address
        with host.private_folder("test") as folder:
            assert folder.startswith("/run/migrena-test-")
        for way in (host.run, lambda *words, host=host: host.work(*words, stall=30)):
            with pytest.raises(HostError, match=r"ended with status 3: the reason$"):
                way("sh", "-c", "echo the reason >&2; exit 3")
    with pytest.raises(HostError, match="user nosudo has no passwordless sudo: sudo: a password is required") as caught:
        reach("src", ssh_user="nosudo")
    assert caught.value.reasons[0].way_out == "add a line to sudoers there: nosudo ALL=(root) NOPASSWD: ALL"


@pytest.mark.usefixtures("banners")
@pytest.mark.parametrize("user", ["root", "operator"])
def test_a_copy_between_hosts_with_banners_arrives(reach: Reach, make_copy: MakeCopy, overlays: tuple[Instance, Instance], user: str) -> None:
    copy = make_copy(compress="on")
    copy.source, copy.destination = reach("src", ssh_user=user), reach("dst", ssh_user=user)
    copy(*overlays)
    assert same_guest(*overlays)


@pytest.mark.parametrize("shell", ["/bin/dash", "/usr/bin/tcsh", "/usr/bin/fish"])
@pytest.mark.parametrize("user", ["root", "operator"])
def test_another_login_shell_runs_the_same_commands(lab: Lab, reach: Reach, shell: str, user: str) -> None:
    with login_shell(lab, user, shell):
        host = reach("src", ssh_user=user)
        assert host.run("printf", r"%s\0", *AWKWARD).split("\0")[:-1] == AWKWARD
        assert host.script('for word; do printf "%s\\0" "$word"; done', *AWKWARD).split("\0")[:-1] == AWKWARD
        assert host.work("echo", "long", stall=30) == "long\n"
        with host.private_folder("test") as folder:
            assert host.succeeds("test", "-d", folder)
        host.confirm_all_ended()


@pytest.mark.parametrize(("shell", "said"), [("/usr/sbin/nologin", "This account is currently not available"), ("/bin/true", "nothing"),
                                             ("/bin/cat", "nothing")])
def test_a_login_shell_that_runs_no_command_is_reported(lab: Lab, reach: Reach, shell: str, said: str) -> None:
    with login_shell(lab, "operator", shell), pytest.raises(HostError, match=rf"the login shell did not run `.*`, output: .*{said}|cat: ") as caught:
        reach("src", ssh_user="operator")
    assert "SSH_USER" in caught.value.reasons[0].way_out


CHATTY = """#!/bin/sh
echo "[kolla] docker exec nova_compute qemu-img"
echo '{"level": "info"}'
/usr/bin/qemu-img.aside "$@"; status=$?
echo "[1] finished"
exit $status
"""


@pytest.fixture
def wrapped(lab: Lab) -> Iterator[None]:
    """Hosts whose qemu-img is a wrapper with something to say."""
    with file(lab, "src", "/usr/bin/qemu-img", CHATTY), file(lab, "dst", "/usr/bin/qemu-img", CHATTY):
        yield


@pytest.mark.parametrize("seed", ["debian", "other"])
def test_a_wrapper_around_qemu_img_may_say_what_it_likes(lab: Lab, request: pytest.FixtureRequest, make_copy: MakeCopy, seed: str) -> None:
    source = Instance.make(lab["src"]).overlay(base(lab["src"], "debian"), 64 * MiB).write("guest", (MiB, 3 * MiB), (40 * MiB, MiB))
    fresh = Instance.make(lab["dst"]).overlay(base(lab["dst"], seed), 64 * MiB)
    request.getfixturevalue("wrapped")
    copy = make_copy()
    copy(source, fresh)
    assert copy.job and copy.job.whole_file is (seed == "debian")
    lab["dst"].run("cp", "/usr/bin/qemu-img.aside", "/usr/bin/qemu-img")
    lab["src"].run("cp", "/usr/bin/qemu-img.aside", "/usr/bin/qemu-img")
    assert same_guest(source, fresh)


@pytest.mark.usefixtures("wrapped")
def test_a_warm_copy_from_a_host_with_a_wrapper_arrives(operator: Operator) -> None:
    done = operator.copy("--warm")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("tool", "says", "act"), [
    ("qemu-img", "qemu-img version 9", lambda host, disk: disk_chain(host, disk.path, "qcow2", shared=False)),
    ("qemu-img", "[]", lambda host, disk: disk_chain(host, disk.path, "qcow2", shared=False)),
    ("qemu-img", '[{"filename": "x"}]', lambda host, disk: disk_chain(host, disk.path, "qcow2", shared=False)),
    ("stat", "a lot", lambda host, disk: free_space(host, disk.path)),
    ("stat", "17", lambda host, disk: free_space(host, disk.path)),
    ("python3", "hello", lambda host, disk: host.work("python3", stall=30).read(pairs_of)),
])
def test_an_answer_of_another_form_is_shown_with_host_and_command(lab: Lab, src: Host, overlays: tuple[Instance, Instance], tool: str, says: str,
                                                                 act: Callable[[Host, Instance], object]) -> None:
    with file(lab, "src", f"/usr/local/bin/{tool}", f"#!/bin/sh\necho '{says}'\n"), pytest.raises(HostError) as caught:
        act(src, overlays[0])
    problem = caught.value.reasons[0].problem
    assert problem.startswith("src: unexpected output of `") and problem.endswith(says or "nothing")
    assert "a wrapper" in caught.value.reasons[0].way_out


@pytest.mark.parametrize(("tool", "word", "needed"), [("qemu-img", "unshare-child-perms", "qemu 5.2"), ("python3", "version_info", "python3 3.6")])
@pytest.mark.parametrize("side", ["src", "dst"])
def test_a_tool_that_is_too_old_is_found_out_while_the_source_still_runs(
        lab: Lab, operator: Operator, side: str, tool: str, word: str, needed: str) -> None:
    wrapper = f'#!/bin/sh\ncase "$*" in *{word}*) exit 1; esac\nexec /usr/bin/{tool} "$@"\n'
    with file(lab, side, f"/usr/local/bin/{tool}", wrapper):
        done = operator.copy()
    assert done.returncode == (3 if side == "src" else 1) and f"{side}: {needed} or later is needed" in done.stderr
    assert "Stop source" not in done.stderr and operator.made() == []
