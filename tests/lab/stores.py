"""What both clouds stand on: MariaDB with their databases, RabbitMQ, and a memcached for each.

Making the empty tables takes OpenStack's own tools long on two cores. It is done once, for the first cloud; the
result is kept as SQL beside the cache of images and loaded for the other cloud, and for both at the next first `up`.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from lab.processes import LabError, command, home, logged, say, wait_until
from lab.roster import Roster
from lab.settings import (
    BUS,
    CLOUDS,
    DATABASE,
    DATABASES,
    EPMD_PORT,
    PASSWORD,
    Cloud,
    socket,
    write_bus,
)

STORES: Final = ("rabbitmq", "mariadb", "epmd")  # in the order in which they end
Item = TypeVar("Item")


@dataclass(frozen=True)
class Schema:
    """Databases that are made together, and the packages whose tools make their tables."""

    name: str
    databases: tuple[str, ...]
    owners: tuple[str, ...]

    def marker(self, cloud: Cloud) -> Path:
        """The file that is there when a cloud has these databases."""
        return cloud.folder / f"{self.name}.done"

    def kept(self) -> Path:
        """The folder with the SQL that fits the installed packages."""
        versions = command("dpkg-query", "-W", "-f", "${Package} ${Version}\n", *self.owners)
        return home() / "cache" / f"{self.name}-{hashlib.sha256(versions.encode()).hexdigest()[:12]}"


CORE: Final = Schema("tables", DATABASES, ("keystone", "glance-common", "placement-common", "nova-common", "neutron-common"))
VOLUMES: Final = Schema("volume-tables", ("cinder",), ("cinder-common",))


def in_parallel(work: Callable[[Item], None], items: Iterable[Item]) -> None:
    """Do the work for every item at once; the first error is raised when all have ended."""
    with ThreadPoolExecutor() as pool:
        for task in [pool.submit(work, item) for item in items]:
            task.result()


def start_stores(roster: Roster) -> None:
    """Start what does not run, and return when all of it can be used."""
    _start_mariadb(roster)
    bus = roster.folder / "rabbitmq"
    env = write_bus(bus)
    # Started here because Erlang would start one on its own that nobody wrote down.
    roster.start("epmd", ["epmd", "-address", "127.0.0.1", "-port", str(EPMD_PORT)], place=("127.0.0.1", EPMD_PORT))
    roster.await_listening("epmd", ("127.0.0.1", EPMD_PORT))
    roster.start("rabbitmq", ["env", "-C", bus, "/usr/lib/rabbitmq/bin/rabbitmq-server"], env, BUS)
    for cloud in CLOUDS:
        roster.start(f"{cloud.name}-memcached", ["memcached", "-u", "nobody", "-l", cloud.address, "-m", "64"],
                     place=(cloud.address, 11211))
    wait_until("MariaDB to answer", lambda: _answers(roster), 60, roster.log("mariadb"))
    roster.await_listening("rabbitmq", BUS)


def _start_mariadb(roster: Roster) -> None:
    """Durability is not what a lab needs: nothing is flushed at each commit."""
    folder = socket().parent
    if not (folder / "mysql").is_dir():
        folder.mkdir(exist_ok=True)
        shutil.chown(folder, "mysql", "mysql")
        logged(["mariadb-install-db", "--no-defaults", "--user=mysql", f"--datadir={folder}", "--skip-test-db",
                "--auth-root-authentication-method=normal"], roster.log("mariadb"))
    roster.start("mariadb", [
        "mariadbd", "--no-defaults", "--user=mysql", f"--datadir={folder}", f"--socket={socket()}",
        f"--bind-address={DATABASE[0]}", f"--port={DATABASE[1]}", "--skip-name-resolve",
        f"--pid-file={folder}/pid", "--max-connections=600", "--innodb-buffer-pool-size=192M",
        "--performance-schema=OFF", "--innodb-flush-log-at-trx-commit=0", "--character-set-server=utf8mb3"], place=DATABASE)


def _answers(roster: Roster) -> bool:
    roster.require("mariadb")
    try:
        sql("SELECT 1")
    except LabError:
        return False
    return True


def sql(statements: str, database: str = "") -> str:
    """What MariaDB answers to these statements, tab-separated."""
    return command("mariadb", "--no-defaults", "-S", socket(), "-u", "root", "-BN", *filter(None, [database]),
                   stdin=statements)


# ---- tables ----


def prepare_databases(roster: Roster, schema: Schema, clouds: Iterable[Cloud]) -> None:
    """Give these clouds databases with empty tables, unless they have them."""
    wanting = [cloud for cloud in clouds if not schema.marker(cloud).exists()]
    if not wanting:
        return
    names = [f"{database}_{cloud.name}" for cloud in wanting for database in schema.databases]
    users = ("'lab'@'localhost'", "'lab'@'%'")
    sql("".join(f"CREATE USER IF NOT EXISTS {user} IDENTIFIED BY '{PASSWORD}';" for user in users) + "".join(
        f"DROP DATABASE IF EXISTS {name}; CREATE DATABASE {name};" + "".join(f"GRANT ALL ON {name}.* TO {user};" for user in users)
        for name in names))
    tables = schema.kept()
    if not tables.is_dir():
        _make_tables(schema, wanting[0], tables, roster.log("tables"))
    in_parallel(lambda cloud: _load_tables(schema, cloud, tables), wanting)


def _make_tables(schema: Schema, cloud: Cloud, tables: Path, log: Path) -> None:
    """Let OpenStack's tools make the tables in this cloud's databases, and keep them as SQL."""
    say(f"making the tables of {', '.join(schema.databases)} (once; they are kept as SQL)")
    placement = {"OS_PLACEMENT_CONFIG_DIR": str(cloud.etc / "placement")}
    in_parallel(lambda argv: logged(argv, log, placement), _makers(schema, cloud.etc))
    draft = tables.with_suffix(".new")
    draft.mkdir(parents=True, exist_ok=True)
    for database in schema.databases:
        source = "nova" if database == "nova_cell0" else database  # Nova's two cells have the same tables
        (draft / f"{database}.sql").write_text(
            command("mariadb-dump", "--no-defaults", "-S", socket(), "-u", "root", f"{source}_{cloud.name}"))
    draft.rename(tables)


def _makers(schema: Schema, etc: Path) -> list[list[str | Path]]:
    """The commands that make the tables."""
    if schema == VOLUMES:
        return [["cinder-manage", "--config-file", etc / "cinder/cinder.conf", "db", "sync"]]
    nova: list[str | Path] = ["nova-manage", "--config-file", etc / "nova/nova.conf"]
    return [
        [*nova, "db", "sync", "--local_cell"],
        ["neutron-db-manage", "--config-file", etc / "neutron/neutron.conf",
         "--config-file", etc / "neutron/ml2_conf.ini", "upgrade", "heads"],
        [*nova, "api_db", "sync"],
        ["keystone-manage", "--config-file", etc / "keystone/keystone.conf", "db_sync"],
        ["glance-manage", "--config-file", etc / "glance/glance-api.conf", "db_sync"],
        ["placement-manage", "--config-file", etc / "placement/placement.conf", "db", "sync"],
    ]


def _load_tables(schema: Schema, cloud: Cloud, tables: Path) -> None:
    """Load the tables."""
    for database in schema.databases:
        sql((tables / f"{database}.sql").read_text(), f"{database}_{cloud.name}")
    if schema == CORE:
        _name_cells(cloud)
    schema.marker(cloud).touch()


def _name_cells(cloud: Cloud) -> None:
    """Tell Nova its two cells, as `nova-manage cell_v2` would."""
    cells = (("cell0", "00000000-0000-0000-0000-000000000000", "none:///", "nova_cell0"),
             ("cell1", "11111111-1111-4111-8111-111111111111", cloud.bus, "nova"))
    sql("".join(f"INSERT INTO cell_mappings (created_at, uuid, name, transport_url, database_connection, disabled) "
                f"VALUES (NOW(), '{uuid}', '{name}', '{bus}', '{cloud.database(database)}', 0);"
                for name, uuid, bus, database in cells), f"nova_api_{cloud.name}")
