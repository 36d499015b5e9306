"""Rows in a SQLite database: `load FILE JOURNAL` adds them until its input ends and says how many are committed,
`check FILE JOURNAL` says how many are there, all of them whole."""

import select
import sqlite3
import sys


def text(row):
    return f"row {row} " * (1 + row * 7919 % 300)


def load(db, journal):
    db.execute(f"PRAGMA journal_mode={journal}")
    # With less, what is committed by removing a journal can be undone by a crash that brings the journal back.
    db.execute("PRAGMA synchronous=EXTRA")
    # So that what is in the write-ahead log often goes to its place.
    db.execute("PRAGMA wal_autocheckpoint=16")
    db.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, text TEXT)")
    row = 0
    print(row, flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        db.execute("BEGIN")
        for _ in range(1 + row % 3):
            row += 1
            db.execute("INSERT INTO rows VALUES (?, ?)", (row, text(row)))
        db.execute("COMMIT")
        print(row, flush=True)


def check(db):
    found = db.execute("PRAGMA integrity_check").fetchall()
    if found != [("ok",)]:
        sys.exit(f"integrity_check: {found}")
    count = 0
    for row, stored in db.execute("SELECT id, text FROM rows ORDER BY id"):
        count += 1
        if row != count or stored != text(row):
            sys.exit(f"row {count} is not what was written")
    print(count)


command, path, journal = sys.argv[1:]
database = sqlite3.connect(path, isolation_level=None)
if command == "load":
    load(database, journal)
else:
    check(database)
