"""Rows in a PostgreSQL cluster of its own: `load DIRECTORY NAME` adds them until its input ends and says how many are
committed, `check DIRECTORY NAME` says how many are there, all of them whole."""

import glob
import os
import select
import shutil
import subprocess
import sys
import tempfile

PROGRAMS = max(glob.glob("/usr/lib/postgresql/*/bin"))
# The server refuses to be root.
OTHER = {"user": "nobody", "group": "nogroup", "extra_groups": []}
TEXT = "repeat('row ' || id || ' ', 1 + id % 300)"


def command(name, *arguments):
    return [f"{PROGRAMS}/{name}", *arguments]


def run(name, *arguments):
    done = subprocess.run(
        command(name, *arguments), capture_output=True, text=True, cwd="/", **OTHER
    )
    if done.returncode != 0:
        sys.exit(f"{name}: {done.stdout}{done.stderr}")
    return done.stdout


class Server:
    """A server while it is needed. Its socket and log are in a directory elsewhere."""

    def __init__(self, data):
        self.data = data

    def __enter__(self):
        self.place = tempfile.mkdtemp()
        shutil.chown(self.place, OTHER["user"])
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": self.place,
            "shared_buffers": "4MB",
            "max_wal_size": "4MB",
            "min_wal_size": "2MB",
        }
        options = " ".join(f"-c {name}='{value}'" for name, value in settings.items())
        log = f"{self.place}/log"
        # Children keep what they inherit, so nothing of ours is among it.
        start = command("pg_ctl", "-D", self.data, "-w", "-t", "300", "-l", log, "-o", options, "start")
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        if subprocess.run(start, cwd="/", **quiet, **OTHER).returncode != 0:
            with open(log) as said:
                sys.exit(f"the server does not start: {said.read()}")
        return ["-X", "-q", "-A", "-t", "-h", self.place, "-U", "rows", "postgres"]

    def __exit__(self, *_):
        run("pg_ctl", "-D", self.data, "-w", "-m", "fast", "stop")
        shutil.rmtree(self.place)


def load(data):
    os.mkdir(data)
    shutil.chown(data, OTHER["user"])
    run("initdb", "-D", data, "-U", "rows", "-A", "trust", "-E", "UTF8", "--no-locale", "--wal-segsize=1")
    with Server(data) as options:
        psql = subprocess.Popen(
            command("psql", *options), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/", **OTHER
        )
        sql, row = "CREATE TABLE rows (id int PRIMARY KEY, text text);", 0
        while True:
            print(sql, f"SELECT {row};", file=psql.stdin, flush=True)
            if psql.stdout.readline() != f"{row}\n":
                sys.exit("psql has said something else")
            print(row, flush=True)
            if select.select([sys.stdin], [], [], 0)[0]:
                break
            first, row = row + 1, row + 1 + row % 3
            sql = f"INSERT INTO rows SELECT id, {TEXT} FROM generate_series({first}, {row}) id;"
        psql.stdin.close()
        psql.wait()


def check(data):
    # As after a start of the machine, when no server can be running.
    if os.path.exists(f"{data}/postmaster.pid"):
        os.remove(f"{data}/postmaster.pid")
    with Server(data) as options:
        whole = f"coalesce(bool_and(text = {TEXT}), true)"
        sql = f"SELECT count(*), coalesce(max(id), 0), {whole} FROM rows"
        count, last, is_whole = run("psql", *options, "-c", sql).strip().split("|")
        if count != last or is_whole != "t":
            sys.exit(f"{count} rows, the last {last}, and whole: {is_whole}")
    print(count)


{"load": load, "check": check}[sys.argv[1]](sys.argv[2])
