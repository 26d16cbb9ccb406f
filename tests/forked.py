"""Runs Python in a process of its own that has PyTorch's compiler imported already.

Importing torch and torch._dynamo takes most of the time of a short script. A server imports them once, and each script gets a
fork of it: a process with a `__main__`, arguments, folder, environment and files of its own, and without attnrewrite and
whatever else a test has imported. A test whose matter is how Python starts, or what is imported, takes `subprocess`.
"""

import atexit
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import types


def python(*arguments, cwd, environment=None, given="", imported=()):
    """As `subprocess.run([sys.executable, *arguments], ...)` with text captured: `-c code`, `-m module` or a path, then what
    is in sys.argv. imported: modules besides torch._dynamo that the process has imported already."""
    server = _server(imported)
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ("stdin", "stdout", "stderr")]
        for file in files:
            with open(file, "w", encoding="utf-8") as opened:
                opened.write(given if file == files[0] else "")
        environment = {**os.environ, **(environment or {})}
        job = {"arguments": [*map(str, arguments)], "cwd": str(cwd), "environment": environment, "files": files}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        said = []
        for file in files[1:]:
            with open(file, encoding="utf-8") as opened:
                said.append(opened.read())
    return subprocess.CompletedProcess(arguments, code, *said)


@functools.cache
def _server(imported):
    command = [sys.executable, __file__, *imported]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def end():
        server.stdin.close()
        server.wait()

    atexit.register(end)
    return server


def _serve():
    """Forks for each line of stdin and writes the exit code. Returns in each fork, with the job."""
    for name in ("torch._dynamo", *sys.argv[1:]):
        importlib.import_module(name)
    while line := sys.stdin.readline():
        child = os.fork()
        if not child:
            return json.loads(line)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()
    sys.exit()


def _become(job):
    """Makes this process the one of the job. Returns its main module and its code; None for `-m`."""
    for number, file in enumerate(job["files"]):
        opened = os.open(file, os.O_RDWR | os.O_APPEND if number else os.O_RDONLY)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)  # the buffer of the other holds the server's input
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environment"])
    own = [path for path in job["environment"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [*own, *(path for path in sys.path[1:] if path not in own)]
    first, *rest = job["arguments"]
    if first == "-m":
        sys.argv[:] = rest
        sys.path.insert(0, os.getcwd())
        return None
    sys.argv[:] = ["-c", *rest[1:]] if first == "-c" else [first, *rest]
    sys.path.insert(0, "" if first == "-c" else os.path.dirname(os.path.abspath(first)))
    main = types.ModuleType("__main__")
    if first == "-c":
        code = compile(rest[0], "<string>", "exec")
    else:
        main.__file__ = os.path.abspath(first)
        with open(first, "rb") as opened:
            code = compile(opened.read(), main.__file__, "exec")
    sys.modules["__main__"] = main
    return main, code


if __name__ == "__main__":
    becoming = _become(_serve())
    if becoming is None:
        import runpy

        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        exec(becoming[1], becoming[0].__dict__)
