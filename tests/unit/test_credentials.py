"""Credentials as people have them: a dictionary of old, clouds.yaml, SRC_OS_* variables; and no secret in what is said about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from migrena import Settings, UsageError, as_v3, cloud_from_yaml, credentials, merge_settings, read_config, session_options
from unit.makers import some_settings

V2_STYLE = {"auth_url": "http://192.0.2.1:5000/v2.0/", "username": "admin", "password": "hunter2", "tenant_name": "admin"}
AS_V3 = {"auth_url": "http://192.0.2.1:5000", "auth_type": "password", "username": "admin", "password": "hunter2", "project_name": "admin",
         "user_domain_id": "default", "project_domain_id": "default"}
CLOUDS = """
clouds:
  here:
    region_name: RegionOne
    interface: internal
    verify: false
    auth: {auth_url: "http://192.0.2.1:5000/v3", username: admin, project_name: admin, user_domain_name: People, project_domain_name: People}
  there:
    auth_type: v3applicationcredential
    auth: {auth_url: "http://192.0.2.2:5000/v3", application_credential_id: abc, application_credential_secret: hunter2}
"""
SECURE = "clouds: {here: {auth: {password: hunter2}, cacert: /etc/ca.pem}}\n"


def test_v2_style_credentials_work_against_v3() -> None:
    assert as_v3(dict(V2_STYLE)) == AS_V3


@pytest.mark.parametrize("address", ["http://192.0.2.1:5000", "https://keystone.example/identity/v3", "https://keystone.example/v2.0x"])
def test_other_addresses_are_left_alone(address: str) -> None:
    assert as_v3({**V2_STYLE, "auth_url": address})["auth_url"] == address


def test_old_names_are_replaced_by_new_ones() -> None:
    creds = as_v3({"auth_url": "u", "user_id": "1", "tenant_id": "2", "api_key": "3"})
    assert creds == {"auth_url": "u", "auth_type": "password", "user_id": "1", "project_id": "2", "password": "3"}


@pytest.mark.parametrize("domains", [{"user_domain_name": "People", "project_domain_name": "Work"},
                                     {"user_domain_id": "1", "project_domain_id": "2"}])
def test_domains_that_are_given_stay(domains: dict[str, str]) -> None:
    creds = as_v3({**V2_STYLE, **domains})
    assert {key: value for key, value in creds.items() if "domain" in key} == domains


def test_old_plugins_become_their_v3_versions() -> None:
    assert as_v3({**V2_STYLE, "auth_type": "v2password"})["auth_type"] == "v3password"


def test_an_application_credential_gets_no_domains() -> None:
    given = {"auth_url": "http://192.0.2.1/v3", "auth_type": "v3applicationcredential", "application_credential_id": "abc",
             "application_credential_secret": "hunter2"}
    assert as_v3(dict(given)) == given


def test_an_empty_entry_counts_as_none_given() -> None:
    assert as_v3({**V2_STYLE, "region_name": "", "cacert": None}) == AS_V3


def test_one_cloud_is_src_or_dst_or_a_name_or_told_by_variables(tmp_path: Path) -> None:
    settings, environment = some_settings(dst_creds=dict(V2_STYLE)), {"OS_CLIENT_CONFIG_FILE": str(tmp_path / "clouds.yaml")}
    (tmp_path / "clouds.yaml").write_text(CLOUDS)
    assert credentials("dst", settings, {}) == AS_V3
    for cloud, more in (("there", {}), ("", {"OS_CLOUD": "there"})):
        assert credentials(cloud, settings, {**environment, **more})["application_credential_id"] == "abc"
    variables = {f"OS_{key.upper()}": value for key, value in V2_STYLE.items()}
    assert credentials("", settings, {**variables, "OS_IDENTITY_API_VERSION": "3", "OS_COMPUTE_API_VERSION": "2.90"}) == AS_V3
    with pytest.raises(UsageError, match="no cloud is named"):
        credentials("", settings, {"OS_USERNAME": "admin"})


def test_credentials_come_from_config() -> None:
    settings = some_settings(src_creds=dict(V2_STYLE), dst_creds={**V2_STYLE, "password": "other"})
    assert credentials("src", settings, {}) == AS_V3
    assert credentials("dst", settings, {}) == {**AS_V3, "password": "other"}


def test_variables_win_over_config_and_each_cloud_has_its_own() -> None:
    variables = {"SRC_OS_AUTH_URL": "http://192.0.2.9/v3", "SRC_OS_USERNAME": "me", "SRC_OS_PASSWORD": "x", "SRC_OS_PROJECT_NAME": "p",
                 "SRC_OS_REGION_NAME": "R", "OS_AUTH_URL": "http://192.0.2.66", "DST_OS_USERNAME": "stray"}
    settings = some_settings(src_creds=dict(V2_STYLE), dst_creds=dict(V2_STYLE))
    assert credentials("src", settings, variables) == {
        "auth_url": "http://192.0.2.9/v3", "username": "me", "password": "x", "project_name": "p", "region_name": "R", "auth_type": "password",
        "user_domain_id": "default", "project_domain_id": "default",
    }
    assert credentials("dst", settings, variables) == AS_V3


@pytest.fixture
def clouds_yaml(tmp_path: Path) -> dict[str, str]:
    """The environment of somebody with clouds.yaml and secure.yaml."""
    (tmp_path / "clouds.yaml").write_text(CLOUDS)
    (tmp_path / "secure.yaml").write_text(SECURE)
    return {"OS_CLIENT_CONFIG_FILE": str(tmp_path / "clouds.yaml")}


def test_a_cloud_is_found_by_its_name_and_wins_over_all_else(clouds_yaml: dict[str, str]) -> None:
    settings = some_settings(src_cloud="here", src_creds={"auth_url": "http://192.0.2.66"})
    found = credentials("src", settings, {**clouds_yaml, "SRC_OS_AUTH_URL": "http://192.0.2.77"})
    assert found == {
        "auth_url": "http://192.0.2.1:5000/v3", "username": "admin", "password": "hunter2", "project_name": "admin", "auth_type": "password",
        "user_domain_name": "People", "project_domain_name": "People", "region_name": "RegionOne", "interface": "internal",
        "verify": False, "cacert": "/etc/ca.pem",
    }


def test_an_application_credential_of_clouds_yaml_stays_one(clouds_yaml: dict[str, str]) -> None:
    found = credentials("dst", some_settings(dst_cloud="there"), clouds_yaml)
    assert found == {"auth_type": "v3applicationcredential", "auth_url": "http://192.0.2.2:5000/v3", "application_credential_id": "abc",
                     "application_credential_secret": "hunter2"}


def test_clouds_yaml_is_found_in_the_working_folder_and_in_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    (home / ".config/openstack").mkdir(parents=True)
    work.mkdir()
    (home / ".config/openstack/clouds.yaml").write_text(CLOUDS.replace("192.0.2.1", "192.0.2.8"))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    assert cloud_from_yaml("here", {})["auth_url"] == "http://192.0.2.8:5000/v3"
    (work / "clouds.yaml").write_text(CLOUDS.replace("192.0.2.1", "192.0.2.9"))
    assert cloud_from_yaml("here", {})["auth_url"] == "http://192.0.2.9:5000/v3"


def test_an_unknown_cloud_is_answered_with_the_known_ones(clouds_yaml: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"has no cloud 'hear'; did you mean here\?") as caught:
        cloud_from_yaml("hear", clouds_yaml)
    assert "here, there" in caught.value.reasons[0].way_out


def test_no_clouds_yaml_at_all_is_reported_with_the_places(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no clouds\.yaml was found") as caught:
        cloud_from_yaml("here", {"OS_CLIENT_CONFIG_FILE": str(tmp_path / "none.yaml")})
    assert "none.yaml" in caught.value.reasons[0].way_out


@pytest.mark.parametrize("content", ["", "clouds:", "- a", "clouds: {here: 5}", "clouds: {here: {auth: 5}}", "cloud: {}", "\x01",
                                     "clouds: {here: [1, 2]}", "a: b: c", "clouds: {5: {}, here: }"])
def test_an_invalid_clouds_yaml_is_reported_as_such(tmp_path: Path, content: str) -> None:
    path = tmp_path / "clouds.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"clouds\.yaml"):
        credentials("src", some_settings(src_cloud="here"), {"OS_CLIENT_CONFIG_FILE": str(path)})


@pytest.mark.parametrize("side", ["src", "dst"])
@pytest.mark.parametrize("creds", [{}, {"username": "admin"}, {"auth_url": ""}])
def test_no_credentials_are_reported_with_all_three_ways_to_give_them(side: str, creds: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"credentials (for|of) the {'source' if side == 'src' else 'destination'} cloud") as caught:
        credentials(side, some_settings(**{f"{side}_creds": creds}), {})
    way_out = caught.value.reasons[0].way_out
    assert all(word in way_out for word in (f"{side.upper()}_CREDS", f"--{side}-cloud", f"{side.upper()}_OS_AUTH_URL"))


def said_about(error: UsageError) -> str:
    """All that an operator would see of it."""
    return " ".join(f"{reason.problem} {reason.way_out}" for reason in error.reasons)


@pytest.mark.parametrize("value", ["password=hunter2", ["hunter2"], "{'password': 'hunter2'", "hunter2"])
@pytest.mark.parametrize("place", ["config", "variable"])
def test_credentials_that_cannot_be_read_are_not_shown(place: str, value: object) -> None:
    environment = {"MIGRENA_SRC_CREDS": str(value)} if place == "variable" else {}
    with pytest.raises(UsageError, match="is not a dictionary") as caught:
        merge_settings({}, environment, {"src_creds": value} if place == "config" else {})
    assert "hunter2" not in said_about(caught.value)


@pytest.mark.parametrize("content", [
    "SRC_CREDS = {'auth_url': 'http://192.0.2.1', 'password': 'hunter2' 'x': 1}", "SRC_CREDS = {'password': 'hunter2}\n",
    "SRC_CREDS = dict(password='hunter2')['no']", "SRC_CRED = {'password': 'hunter2'}", "SRC_CREDS = {'password': int('hunter2')}",
])
def test_a_config_that_cannot_be_read_does_not_show_its_password(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.py"
    path.write_text(content)
    with pytest.raises(UsageError) as caught:
        read_config(path)
    if "int(" in content:  # what an operator's own code says is the operator's own
        return
    assert "hunter2" not in said_about(caught.value)


@pytest.mark.parametrize("content", ["clouds: {here: {auth: {password: hunter2: x}}}", "clouds:\n  here:\n    auth:\n      password: \"hunter2\n",
                                     "clouds: {here: hunter2}", "clouds: {here: {auth: {password: *hunter2}}}",
                                     "clouds: {here: {auth: {password: !hunter2 x}}}", "clouds:\n  here:\n    password: hunter2\n   bad: 1\n"])
@pytest.mark.parametrize("name", ["clouds.yaml", "secure.yaml"])
def test_a_yaml_that_cannot_be_read_does_not_show_its_password(tmp_path: Path, content: str, name: str) -> None:
    (tmp_path / "clouds.yaml").write_text(CLOUDS)
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError) as caught:
        cloud_from_yaml("here", {"OS_CLIENT_CONFIG_FILE": str(tmp_path / "clouds.yaml")})
    assert "hunter2" not in said_about(caught.value)


def test_settings_of_credentials_start_empty() -> None:
    assert (Settings().src_creds, Settings().dst_creds) == ({}, {})


@pytest.mark.parametrize(("own", "found"), [
    ({}, (True, 60.0)), ({"insecure": "false"}, (True, 60.0)), ({"insecure": "True", "timeout": "5"}, (False, 5.0)),
    ({"verify": "no"}, (False, 60.0)), ({"verify": False}, (False, 60.0)), ({"insecure": "1", "cacert": "/a.pem"}, ("/a.pem", 60.0))])
def test_words_about_the_certificate_are_understood_as_they_are_meant(own: dict[str, object], found: tuple[object, float]) -> None:
    assert session_options(own, "source") == found


@pytest.mark.parametrize("own", [{"insecure": "maybe"}, {"timeout": "soon"}])
def test_words_about_the_certificate_that_mean_nothing_are_refused(own: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="credentials of the source cloud: verify, insecure or timeout"):
        session_options(own, "source")
