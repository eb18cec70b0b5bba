"""A store of files that forks a child process for each client: a good use of `fork`.

Clients share only files, so the children's separate copies of the memory do no harm. Counting words keeps a processor
busy; several children can do it at the same time. A child that dies takes only its own client along.

    reqtable serve examples/files.py:Files --dispatch fork
    printf 'put poem 14\\nroses are red\\nwords poem\\n' | nc -N 127.0.0.1 7000

The files are in the folder that FILES_FOLDER names, or in ./files.
"""

import os
import re
import tempfile
from pathlib import Path

from reqtable import StreamRequestHandler

SIZE_MAX = 16 * 2**20


class Files(StreamRequestHandler):
    """Answers put NAME N\\n<N bytes>, get NAME, words NAME and list. Each answer begins with `ok` or `error`."""

    timeout = 60

    def setup(self) -> None:
        super().setup()
        self.folder = Path(os.environ.get("FILES_FOLDER", "files"))
        self.folder.mkdir(parents=True, exist_ok=True)

    def handle(self) -> None:
        while text := self.rfile.readline(1024):
            try:
                answer = self.answer(text.decode("ascii").split())
            except FileNotFoundError:
                answer = b"error: no such file\n"
            except ValueError as error:
                answer = b"error: %b\n" % str(error).encode()
            self.wfile.write(answer)

    def answer(self, words: list[str]) -> bytes:
        match words:
            case ["put", name, size]:
                self.put(self.path(name), int(size))
                return b"ok\n"
            case ["get", name]:
                data = self.path(name).read_bytes()
                return b"ok %d\n%b" % (len(data), data)
            case ["words", name]:
                return b"ok %d\n" % len(self.path(name).read_bytes().split())
            case ["list"]:
                names = sorted(each.name for each in self.folder.iterdir() if each.suffix != ".new")
                return b"ok %b\n" % " ".join(names).encode()
        raise ValueError("say put NAME N, get NAME, words NAME or list")

    def put(self, path: Path, size: int) -> None:
        """Store the data as a file, in one step: another child never reads half of the file."""
        if not 0 <= size <= SIZE_MAX:
            raise ValueError(f"the size must be from 0 to {SIZE_MAX}")
        data = self.rfile.read(size)
        if len(data) < size:
            raise ValueError("the end of file came before the end of the data")
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".new", delete=False) as new:
            new.write(data)
        os.replace(new.name, path)

    def path(self, name: str) -> Path:
        if not re.fullmatch(r"\w[\w.-]{0,99}", name):
            raise ValueError("a name is letters, digits, dots and hyphens")
        return self.folder / name
