"""What a power cut leaves of a folder: names and contents that were synced, and luck with the rest.

POSIX promises a name once its folder was synced, and a content once its file was. Of what was not
synced, a folder keeps its first changes up to some point, each folder up to another one, and a
file keeps a beginning. A rename from one folder to another may thus survive in either, both or
none.
"""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import dataclass

FOLDER = "folder"


@dataclass(eq=False)
class File:
    """A file's content, whatever names it has.

    Attributes:
        synced: the content that a power cut leaves; None where it was never synced.
        last: the content when its last name went away.
    """

    synced: bytes | None = None
    last: bytes = b""


Entry = File | str | None


class Disk:
    """Follows the changes to one folder and what below it is durable; paths are absolute."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._files: dict[str, File] = {}
        self._durable: dict[str, File | str] = {}
        self._pending: dict[str, list[list[tuple[str, Entry]]]] = {}

    def created(self, path: str) -> None:
        """A file was opened for writing."""
        if path not in self._files:
            self._files[path] = File()
            self._change((path, self._files[path]))

    def made(self, folder: str) -> None:
        """A folder was created."""
        self._change((folder, FOLDER))

    def linked(self, src: str, dst: str) -> None:
        """A file got a second name."""
        self._files[dst] = self._files[src]
        self._change((dst, self._files[src]))

    def removed(self, path: str, content: bytes) -> None:
        """A name went away."""
        self._files.pop(path).last = content
        self._change((path, None))

    def moved(self, src: str, dst: str, replaced: bytes | None) -> None:
        """A file was renamed, perhaps over another one."""
        if replaced is not None:
            self._files[dst].last = replaced
        self._files[dst] = self._files.pop(src)
        changes: list[tuple[str, Entry]] = [(src, None), (dst, self._files[dst])]
        if os.path.dirname(src) == os.path.dirname(dst):
            self._change(*changes)
        else:
            for change in changes:
                self._change(change)

    def synced(self, path: str) -> None:
        """A file or folder was synced."""
        if path in self._files:
            self._files[path].synced = _read(path)
        else:
            self._settle(self._pending.pop(path, []))

    def adopt(self) -> None:
        """Take all that is there now as durable, whoever made it."""
        self._pending.clear()
        folders: list[str] = []
        files: dict[str, bytes] = {}
        for folder, _, names in os.walk(self.root):
            folders.append(folder)
            files |= {path: _read(path) for path in (f"{folder}/{name}" for name in names)}
        self._know(folders, files)

    def lose(self, chance: random.Random) -> None:
        """The power goes and comes back: make the folder what may be left of it."""
        for changes in self._pending.values():
            self._settle(changes[: chance.randint(0, len(changes))])
        self._pending.clear()
        contents = {id(file): _read(path) for path, file in self._files.items()}
        kept: dict[str, bytes] = {}
        folders: list[str] = []
        # Names hold random tokens: an order that depended on them could not be drawn again.
        for path, entry in sorted(self._durable.items(), key=lambda item: item[0].count("/")):
            if path != self.root and os.path.dirname(path) not in folders:
                continue
            if isinstance(entry, File):
                kept[path] = _survivor(entry, contents.get(id(entry), entry.last), chance)
            else:
                folders.append(path)
        self._rebuild(folders, kept)

    def _rebuild(self, folders: list[str], files: dict[str, bytes]) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        for folder in folders:
            os.mkdir(folder)
        for path, content in files.items():
            with open(path, "wb") as file:
                file.write(content)
        self._know(folders, files)

    def _know(self, folders: list[str], files: dict[str, bytes]) -> None:
        self._files = {path: File(synced=content) for path, content in files.items()}
        self._durable = {**dict.fromkeys(folders, FOLDER), **self._files}

    def _change(self, *changes: tuple[str, Entry]) -> None:
        self._pending.setdefault(os.path.dirname(changes[0][0]), []).append(list(changes))

    def _settle(self, changes: list[list[tuple[str, Entry]]]) -> None:
        for path, entry in (change for together in changes for change in together):
            if entry is None:
                self._durable.pop(path, None)
            else:
                self._durable[path] = entry


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _survivor(file: File, content: bytes, chance: random.Random) -> bytes:
    """The synced content, and of a longer one perhaps more."""
    synced = file.synced or b""
    if not content.startswith(synced):
        return chance.choice([synced, content])
    return content[: chance.choice([len(synced), chance.randint(len(synced), len(content))])]
