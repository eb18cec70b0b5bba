"""Configuration: which setting wins, the error messages, the command, and reloading."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import reqtable
import reqtable.config.options
from reqtable import Config, ConfigurationError, Limits, Transition, line, state
from reqtable.config import (
    Certificate,
    ControlOptions,
    ExecutorOptions,
    ForkOptions,
    GreenletOptions,
    PoolOptions,
    ProxyOptions,
    RestartOptions,
    ThreadOptions,
    TLSOptions,
    effective,
)
from reqtable.config.options import EXAMPLES
from tests.support import WAIT_S, Client, Started

ANY = ("127.0.0.1", 0)
ROOT = Path(__file__).parent.parent


class Echo(reqtable.StateRequestHandler):
    @state(line())
    def command(self, text: bytes) -> Transition:
        self.send(text)
        return self.command


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to a folder without a configuration file, and remove the variables from the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REQTABLE_DISPATCH", raising=False)
    monkeypatch.delenv("REQTABLE_CONFIG", raising=False)


def dispatch_of(base: Any = reqtable.TCPServer, **options: Any) -> str:
    with base(ANY, Echo, **options) as server:
        return str(server._policies.chosen.name)


def write(text: str, name: str = "reqtable.toml") -> Path:
    path = Path(name)
    path.write_text(text)
    return path


# -- precedence -------------------------------------------------------------------------------------------------------


def test_the_strongest_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch_of() == "inline"
    assert dispatch_of(reqtable.ThreadingTCPServer) == "thread", "the class attribute, over the default"
    file = Config.load(write('dispatch = "pool"\n'))
    assert dispatch_of(reqtable.ThreadingTCPServer, config=file) == "pool", "the file, over the class attribute"
    monkeypatch.setenv("REQTABLE_DISPATCH", "greenlet")
    assert dispatch_of(reqtable.ThreadingTCPServer, config=file) == "greenlet", "the environment, over the file"
    assert dispatch_of(reqtable.ThreadingTCPServer, config=Config(dispatch="pool")) == "greenlet"
    assert dispatch_of(config=file, dispatch="fork") == "fork", "the argument, over the environment"
    assert dispatch_of(config=Config.load(dispatch="fork")) == "fork", "an argument of load() is one too"
    assert Config.load().dispatch == "greenlet"


def test_a_file_is_read_where_it_is_asked_for_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    write('dispatch = "pool"\n')
    assert dispatch_of() == "inline", "a server reads no file by surprise"
    assert Config.load().dispatch == "pool"
    write('dispatch = "thread"\n', "other.toml")
    monkeypatch.setenv("REQTABLE_CONFIG", "other.toml")
    assert dispatch_of() == "thread", "REQTABLE_CONFIG names one"
    assert Config.load().dispatch == "thread"
    assert Config.load("reqtable.toml").dispatch == "pool"


def test_pyproject_is_read_where_there_is_no_file_of_its_own() -> None:
    write('[project]\nname = "x"\n', "pyproject.toml")
    assert Config.load() == Config()
    write(
        '[project]\nname = "x"\n\n[tool.reqtable]\ndispatch = "pool"\n[tool.reqtable.pool]\nsize = 3\n',
        "pyproject.toml",
    )
    config = Config.load()
    assert (config.dispatch, config.pool) == ("pool", PoolOptions(3))
    assert config.origins["pool.size"] == "pyproject.toml:7"
    write('dispatch = "thread"\n')
    assert Config.load().dispatch == "thread"


def test_everything_can_be_set() -> None:
    path = write(
        """
dispatch = "executor"
call_on = "process"
limits.entries_max = 10
[limits]
""".replace("limits.entries_max = 10\n[limits]", "[limits]\nentries_max = 10\nrequest_timeout_s = 3\nrecv_bytes = 512")
        + """
[thread]
threads_max = 20
[pool]
size = 2
[fork]
max_children = 3
[executor]
factory = "m:f"
arguments = { a = 1, b = ["x"] }
[executors.cluster]
factory = "n:g"
"""
    )
    config = Config.load(path)
    assert config.limits == Limits(entries_max=10, request_timeout_s=3, recv_bytes=512)
    assert (config.dispatch, config.call_on) == ("executor", "process")
    assert (config.thread.threads_max, config.pool.size, config.fork.max_children) == (20, 2, 3)
    assert config.executor == ExecutorOptions("m:f", {"a": 1, "b": ["x"]})
    assert config.executors == {"cluster": ExecutorOptions("n:g")}
    shown = {key: (value, origin) for key, value, origin in effective(config)}
    assert shown["limits.entries_max"] == (10, "reqtable.toml:5")
    assert shown["limits.inbox_max"] == (64, "default")
    assert shown["executors.cluster.factory"] == ("n:g", "reqtable.toml:19")
    with reqtable.TCPServer(ANY, Echo, config=Config(limits=config.limits)) as server:
        assert server.table.limits.entries_max == 10


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dispatsh = 1\n", "reqtable.toml:1: there is no key dispatsh (= 1): did you mean dispatch?"),
        (
            "\n[limits]\n\nentry_max = 3\n",
            "reqtable.toml:4: there is no key limits.entry_max (= 3): did you mean entries_max?",
        ),
        ("[nonsense]\nx = 1\n", "reqtable.toml:1: there is no key nonsense (= {'x': 1}): there are dispatch, call_on"),
        ("dispatch = 5\n", 'toml:1: dispatch must be a string, such as "pool", not 5'),
        ("workers = 'x'\n", "toml:1: workers must be a whole number above 0, not 'x' (or leave it out)"),
        ('[limits]\nentries_max = "many"\n', "toml:2: entries_max must be a whole number above 0, not 'many'"),
        ("limits.entries_max = true\n", "reqtable.toml:1: entries_max must be a whole number above 0, not True"),
        (
            "[limits]\n\nidle_timeout_s = 'never'\n",
            "toml:3: idle_timeout_s must be a number of seconds above 0, not 'never' (or leave it out)",
        ),
        (
            "[tls]\ncert = 'c'\nalpn = 'h2'\n",
            """toml:3: tls.alpn must be a list, such as ["h2", "http/1.1"], not 'h2'""",
        ),
        (
            "[tls]\ncert = 'c'\nclient_ca = 'd'\nclient_cert_required = 1\n",
            "toml:4: tls.client_cert_required must be true or false, not 1",
        ),
        ("[tls]\ncert = 'c'\n[tls.names.b]\ncert = 3\n", 'toml:4: cert must be a string, such as "server.pem", not 3'),
        (
            "[limits]\nlinger_timeout_s = 0\n",
            "toml:2: linger_timeout_s must be a number of seconds above 0, not 0",
        ),
        ("[pool]\nsize = 0\n", "reqtable.toml:2: pool.size must be a whole number above 0, not 0"),
        ("pool = 3\n", "reqtable.toml:1: pool must be a table, not 3"),
        ("executors = 3\n", "reqtable.toml:1: executors must be a table, not 3"),
        ("[executors.mine]\nfactory = 'x'\n", "reqtable.toml:2: executor factory 'x': write it as module:callable"),
        ("pool = { size = -1 }\n", "reqtable.toml:1: pool.size must be a whole number above 0, not -1"),
        ("dispatch = \n", "reqtable.toml: not TOML: Invalid value (at line 1, column 12)"),
        ("idle_timeout_s = 3\n", "toml:1: there is no key idle_timeout_s (= 3): it belongs under [limits]"),
        ("entries_mx = 3\n", "toml:1: there is no key entries_mx (= 3): did you mean entries_max under [limits]?"),
        (
            "dispatsh = 1\npool = 3\n[limits]\nentry_max = 3\n[fork]\nmax_children = 0\n",
            "reqtable.toml:1: there is no key dispatsh (= 1): did you mean dispatch?; reqtable.toml:2: pool must be a "
            "table, not 3; reqtable.toml:4: there is no key limits.entry_max (= 3): did you mean entries_max?; "
            "reqtable.toml:6: fork.max_children must be a whole number above 0, not 0",
        ),
        ("[tls.names.b]\nkex = 1\n", "toml:2: there is no key tls.names.b.kex (= 1): did you mean key?"),
        ("[limits]\n[limits]\n", "not TOML: Cannot declare [limits] twice (at line 2, column 8)"),
        ("[tls.names]\n[tls.names]\n", "not TOML: Cannot declare [tls.names] twice (at line 2, column 11)"),
        ("\nworkers = null # none\n", "reqtable.toml:2: TOML has no null: leave workers out"),
        ('[executor.arguments]\nx = """\ny = null\n"""\nz = =\n', "not TOML: Invalid value (at line 5, column 5)"),
        ("# a\u2028b\npool = 3\n", "reqtable.toml:2: pool must be a table, not 3"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text: str, said: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        Config.load(write(text))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Config(limits={"entries_max": 3}), "limits must be Limits, such as Limits(entries_max=1000), not {'"),  # type: ignore[arg-type]
        (lambda: Config(tls={}), 'tls must be TLSOptions, such as TLSOptions(cert="server.pem"), not {}'),  # type: ignore[arg-type]
        (lambda: Config(dispatch=3), 'dispatch must be a string, such as "pool", not 3'),  # type: ignore[arg-type]
        (lambda: Config(workers="4"), "workers must be a whole number above 0, not '4' (or leave it out)"),  # type: ignore[arg-type]
        (lambda: Config(call_on=None), 'call_on must be a string, such as "thread", not None'),  # type: ignore[arg-type]
        (lambda: Config(executors={"a": 3}), 'executors must be a mapping, such as {"cluster": Executor'),  # type: ignore[dict-item]
        (lambda: TLSOptions(alpn="h2"), """tls.alpn must be a list, such as ["h2", "http/1.1"], not 'h2'"""),  # type: ignore[arg-type]
        (lambda: TLSOptions(alpn=("h2", 2)), 'tls.alpn must be a list, such as ["h2", "http/1.1"], not ('),  # type: ignore[arg-type]
        (lambda: ProxyOptions("::1"), """proxy.trusted must be a list, such as ["10.0.0.0/8", "unix"], not '::1'"""),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused_with_what_the_field_takes(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        make()
    assert str(raised.value).startswith(said)


def test_every_key_but_numbers_and_truths_has_an_example_of_its_type() -> None:
    for kind in (
        Config,
        ThreadOptions,
        PoolOptions,
        ForkOptions,
        GreenletOptions,
        ExecutorOptions,
        Certificate,
        TLSOptions,
        ProxyOptions,
        ControlOptions,
        RestartOptions,
    ):
        for name, hint in get_type_hints(kind).items():
            if hint not in (int, bool, int | None):
                example = eval(EXAMPLES[name], vars(reqtable))
                options = (
                    {"cert": "c", name: example} if issubclass(kind, TLSOptions | Certificate) else {name: example}
                )
                assert getattr(kind(**options), name) == example


def test_a_list_is_as_good_as_a_tuple() -> None:
    assert list(TLSOptions(alpn=["h2"]).alpn) == ["h2"]  # type: ignore[arg-type]
    assert Config.load(write("[proxy]\ntrusted = ['::1']\n")).proxy.trusted == ("::1",)


def test_a_file_that_is_not_utf_8_is_told() -> None:
    Path("reqtable.toml").write_bytes('dispatch = "pöol"\n'.encode("latin-1"))
    with pytest.raises(ConfigurationError, match=r"^reqtable\.toml: not TOML: 'utf-8' codec .*: save it as UTF-8$"):
        Config.load()


def test_a_file_that_is_named_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=r"^missing\.toml: no such file or directory$"):
        Config.load("missing.toml")
    monkeypatch.setenv("REQTABLE_CONFIG", "missing.toml")
    with pytest.raises(ConfigurationError, match=r"^environment REQTABLE_CONFIG: missing\.toml: no such file"):
        reqtable.TCPServer(ANY, Echo)


def test_a_policy_that_there_is_not_is_said_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    path = write('\ndispatch = "nowhere"\n')
    with pytest.raises(
        ConfigurationError, match=r"^reqtable\.toml:2: there is no dispatch policy 'nowhere'; there are"
    ):
        reqtable.TCPServer(ANY, Echo, config=Config.load(path))
    monkeypatch.setenv("REQTABLE_DISPATCH", "elsewhere")
    with pytest.raises(ConfigurationError, match=r"^environment REQTABLE_DISPATCH: there is no .* 'elsewhere'"):
        reqtable.TCPServer(ANY, Echo)


# -- the command ------------------------------------------------------------------------------------------------------


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "reqtable", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, env=env)


def test_config_shows_values_and_origins() -> None:
    write('[pool]\nsize = 3\n[executors.mine]\nfactory = "m:f"\n')
    lines = run("config", REQTABLE_DISPATCH="pool").stdout.splitlines()
    shown = [line.split(maxsplit=2) for line in lines]
    assert ["dispatch", '"pool"', "environment REQTABLE_DISPATCH"] in shown
    assert ["pool.size", "3", "reqtable.toml:2"] in shown
    assert ["thread.threads_max", "-", "default"] in shown
    assert ["executors.mine.factory", '"m:f"', "reqtable.toml:4"] in shown
    assert ["tls.client_cert_required", "false", "without tls.client_ca"] in shown
    assert ["dispatch", '"fork"', "argument"] in [
        line.split(maxsplit=2)
        for line in run("config", "--dispatch", "fork", REQTABLE_DISPATCH="pool").stdout.splitlines()
    ]


@pytest.mark.parametrize("command", [["config"], ["serve", str(ROOT / "examples/echo.py") + ":StateEcho"]])
def test_a_bad_configuration_is_exit_code_78(command: list[str]) -> None:
    write("[pool]\nsize = 0\n")
    result = run(*command)
    assert result.returncode == 78
    assert result.stderr == "reqtable: reqtable.toml:2: pool.size must be a whole number above 0, not 0\n"
    assert result.stdout == ""


# -- reading it again -------------------------------------------------------------------------------------------------


def test_sighup_reads_it_again_and_drops_nobody() -> None:
    path = write('dispatch = "inline"\n')
    command = [sys.executable, "-m", "reqtable", "serve", str(ROOT / "examples/miniredis.py") + ":MiniRedis"]
    command += ["--bind", "tcp://127.0.0.1:0", "--config", str(path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with Started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        address = ("127.0.0.1", int(process.stdout.readline().rpartition(":")[2]))
        try:
            clients: list[Client] = []

            def reload(text: str) -> str:
                path.write_text(text)
                process.send_signal(signal.SIGHUP)
                assert process.stderr is not None
                return process.stderr.readline()

            def policies() -> list[str]:
                """Check that each request is still answered, and return their policies in order."""
                clients.append(Client(address))
                for client in clients:
                    assert client.ask(b"SET key value\r\n") == b"+OK\r\n"
                    assert client.ask(b"GET key\r\n") == b"$5\r\n"
                    assert client.line() == b"value\r\n"
                return [policy_of(clients[0], number) for number in range(1, len(clients) + 1)]

            assert policies() == ["R"]
            assert "was read again" in reload('dispatch = "thread"\n')
            assert policies() == ["R", "D"]
            assert "was read again" in reload('dispatch = "pool"\n[limits]\nentries_max = 3\n')
            assert policies() == ["R", "D", "R"]
            assert "reqtable.toml:1: there is no key nonsense" in reload("nonsense = 1\n")
            assert "there is no dispatch policy 'nowhere'" in reload('dispatch = "nowhere"\n')
            assert "dispatch policy 'greenlet'" not in reload('dispatch = "greenlet"\n')
            for client in clients:
                assert client.ask(b"GET key\r\n") == b"$5\r\n", "nobody was dropped"
                client.line()
                client.close()
        finally:
            process.terminate()
        process.stderr.read()
        assert process.wait(WAIT_S) == 0


def policy_of(client: Client, number: int) -> str:
    """Return "D" if the request of that number is delegated to a thread, else "R"."""
    size = int(client.ask(b"CLIENT LIST\r\n")[1:])
    listing = client.receive(size + 2).decode()
    [line] = [each for each in listing.splitlines() if each.startswith(f"id={number} ")]
    return "D" if "state=DELEGATED" in line else "R"


def test_a_configuration_that_the_handler_can_not_run_under_is_not_taken() -> None:
    class Async(reqtable.AsyncRequestHandler):
        async def handle(self) -> None:
            pass

    with reqtable.TCPServer(ANY, Async) as server:
        before = server._policies
        with pytest.raises(ConfigurationError, match="only a StateRequestHandler is data"):
            server.reconfigure(Config(dispatch="executor"))
        assert server._policies is before
        server.reconfigure(Config(dispatch="pool", limits=Limits(entries_max=7)))
        assert (server._policies.chosen.name, server.table.limits.entries_max) == ("pool", 7)

    with reqtable.TCPServer(ANY, Async, dispatch="thread") as server:
        server.reconfigure(Config(dispatch="pool"))
        assert server._policies.chosen.name == "thread", "the constructor's argument pins it"


def test_the_place_of_a_factory_is_said() -> None:
    for text in (
        'dispatch = "executor"\n\n[executor]\nfactory = "nomod:x"\n',
        '\n\n[executors.c]\nfactory = "nomod:x"\n',
    ):
        with pytest.raises(ConfigurationError, match=r"^reqtable\.toml:4: .*factory 'nomod:x': ModuleNotFoundError"):
            reqtable.TCPServer(ANY, Echo, config=Config.load(write(text)))


def test_no_line_is_better_than_a_wrong_one() -> None:
    with pytest.raises(ConfigurationError, match=r"^reqtable\.toml: pool\.size must be"):
        Config.load(write('call_on = """\nsize = 0\n[pool]\nsize = 1\n"""\n[pool]\nsize = 0\n'))


@pytest.mark.parametrize("text", ['dispatch = "nope"\n', 'dispatch = ""\n'])
def test_the_command_refuses_what_serving_would(text: str) -> None:
    write(text)
    result = run("config")
    assert result.returncode == 78
    assert result.stderr.startswith("reqtable: reqtable.toml:1: there is no dispatch policy '")


def test_a_file_named_as_a_standard_module_is_refused() -> None:
    write("import reqtable\nclass Echo(reqtable.StreamRequestHandler): pass\n", "queue.py")
    result = run("states", "queue.py:Echo")
    assert "the standard library has a module queue: give the file another name" in result.stderr
