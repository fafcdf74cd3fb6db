"""Programs that try to leave the sandbox, each as text. One that gets somewhere prints `GOT`, or leaves a trace in the folder
that it was told of. `HOME` and `PORT` stand for a folder and a port of whoever tries them.

Those that begin with `C` go past Python to the kernel, as a program would that knows the rules of Python's modules.
"""

from __future__ import annotations

GOT = "got there"
_TELL = f"\nprint({GOT!r}, flush=True)\n"
C = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def need(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "no")
    return result
"""

PROCESSES = {
    "fork": "import os\nfor _ in range(8):\n    if os.fork() == 0:\n        os._exit(0)",
    "fork by C": C + "if need(libc.fork()) == 0:\n    libc._exit(0)",
    "fork by number": C + "import platform\n"
    "if need(libc.syscall({'x86_64': 57, 'aarch64': 220}[platform.machine()], 17, 0, 0, 0, 0)) == 0:\n    libc._exit(0)",
    "thread": "import _thread, time\ndone = []\n_thread.start_new_thread(done.append, (1,))\n"
    "while not done:\n    time.sleep(0.01)",
    "spawn": "import os\nos.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)",
    "system": "import os\nassert os.system('true') == 0",
    "subprocess": "import subprocess\nsubprocess.run(['true'], check=True)",
    "popen": "import os\nassert os.popen('echo x').read()",
    "exec": f"import os\nos.execv('/bin/echo', ['echo', {GOT!r}])",
    "exec by C": C
    + f"libc.execv(b'/bin/echo', (ctypes.c_char_p * 3)(b'echo', {GOT.encode()!r}, None))\nraise SystemExit(1)",
    "system by C": C + "assert libc.system(b'true') == 0",
    "system by way of a class": "[found] = [c for c in ().__class__.__base__.__subclasses__() if '_wrap_close' in str(c)]\n"
    "assert found.__init__.__globals__['system']('true') == 0",
}
SECRETS = {
    "open": "print(open('HOME/secret').read())",
    "open by descriptor": "import os\nprint(os.read(os.open('HOME/secret', 0), 99))",
    "open by C": C + "text = ctypes.create_string_buffer(99)\n"
    "libc.read(need(libc.open(b'HOME/secret', 0)), text, 99)\nprint(text.value)",
    "pathlib": "import pathlib\nprint(pathlib.Path('HOME/secret').read_text())",
    "import of a path": "from importlib.machinery import SourceFileLoader as S\n"
    "print(S('x', 'HOME/secret').get_data('HOME/secret'))",
    "import by sys.path": "import sys\nsys.path.insert(0, 'HOME')\nimport hidden\nprint(hidden.text)",
    "list": "import os\nprint(os.listdir('HOME'))",
    "symlink": "import os\nos.symlink('HOME/secret', 'HOME/link')\nprint(open('HOME/link').read())",
    "environment": "import os\nprint(os.environ['SECRET'])",
    "environment by C": C + "libc.getenv.restype = ctypes.c_char_p\nprint(libc.getenv(b'SECRET').decode())",
    "own memory": "text = b'sec' + b'ret' * 9\nwith open('/proc/self/mem', 'rb') as mem:\n"
    "    mem.seek(id(text) + 32)\n    print(mem.read(6).decode())",
    "an inherited descriptor": "import os\nfor number in range(3, 999):\n    try:\n        os.lseek(number, 0, 0)\n"
    "        print(os.read(number, 99))\n    except OSError:\n        pass",
    "standard input": "import os\nprint(os.read(0, 99))",
}
SECRET = "secretretretretretretretret"  # that the folder, the environment and a descriptor have
READ = {
    "users": "assert 'root' in open('/etc/passwd').read()",
    "home": "import os\nassert os.listdir(os.path.expanduser('~')) is not None",
    "processes": "import os\nassert '1' in os.listdir('/proc')",
    "what there is": "import os\nos.stat('/etc/passwd')",
    "environment of the parent": "import os\nassert 'PATH=' in open(f'/proc/{os.getppid()}/environ').read()",
    "device": "assert open('/dev/zero', 'rb').read(8)",
    "name of the machine": "import os\nassert os.uname().nodename",
    "who is running": "import os\nassert os.getuid() >= 0 and os.getppid() > 0",
}
NETWORK = {
    "TCP": "import socket\nsocket.create_connection(('127.0.0.1', PORT)).send(b'x')",
    "TCP by its inner module": "import _socket\ns = _socket.socket(2, 1)\ns.connect(('127.0.0.1', PORT))",
    "TCP by C": C + "need(libc.socket(2, 1, 0))",
    "UDP": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    "UNIX": "import socket\nsocket.socket(socket.AF_UNIX).bind('HOME/socket')",
    "a pair": "import socket\nsocket.socketpair()",
    "listening": "import socket\nsocket.create_server(('127.0.0.1', 0))",
    "a name": "import socket\nsocket.getaddrinfo('localhost', 80)",
    "a name by C": C
    + "found = ctypes.c_void_p()\nassert libc.getaddrinfo(b'localhost', b'80', None, ctypes.byref(found)) == 0",
    "HTTP": "import urllib.request as u\ntry:\n"
    "    u.urlopen('http://127.0.0.1:PORT/', timeout=1)\nexcept TimeoutError:\n    pass",
}
WRITES = {
    "write": "open('HOME/new', 'w').write('x')",
    "write by C": C + "need(libc.open(b'HOME/new', 0o101, 0o600))",
    "huge file": "with open('HOME/new', 'wb') as f:\n    for _ in range(16):\n        f.write(bytes(2**20))",
    "sparse file": "with open('HOME/new', 'wb') as f:\n    f.truncate(2**33)",
    "many files": "for n in range(200):\n    open(f'HOME/new-{n}', 'w').close()",
    "folder": "import os\nos.mkdir('HOME/new')",
    "remove": "import os\nos.remove('HOME/secret')",
    "rename": "import os\nos.rename('HOME/secret', 'HOME/new')",
    "symlink out": "import os\nos.symlink('/etc/passwd', 'HOME/new')",
    "link": "import os\nos.link('HOME/secret', 'HOME/new')",
    "pipe with a name": "import os\nos.mkfifo('HOME/new')",
    "rights": "import os\nos.chmod('HOME/secret', 0)\nos.rename('HOME/secret', 'HOME/new')",
    "temporary": "import tempfile\ntempfile.mkstemp(dir='HOME')",
    "database": "import sqlite3\nsqlite3.connect('HOME/new').execute('create table t (x)').connection.commit()",
    "a process that outlives it": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
    "        os.close(1)\n        os.close(2)\n        open('HOME/new', 'w').close()\n    os._exit(0)",
}
POWERS = {
    "signal to the parent": "import os, signal\nos.kill(os.getppid(), signal.SIGWINCH)",
    "signal by C": C + "import os\nneed(libc.kill(os.getppid(), 28))",
    "signal to its group": "import os, signal\nos.killpg(0, signal.SIGWINCH)",
    "being traced": C + "need(libc.ptrace(0, 0, 0, 0))",
    "memory of a process": C + "import os\nclass Span(ctypes.Structure):\n"
    "    _fields_ = (('base', ctypes.c_void_p), ('length', ctypes.c_size_t))\n"
    "a, b = ctypes.create_string_buffer(b'x'), ctypes.create_string_buffer(2)\n"
    "one, two = Span(ctypes.addressof(a), 1), Span(ctypes.addressof(b), 1)\n"
    "need(libc.process_vm_readv(os.getpid(), ctypes.byref(two), 1, ctypes.byref(one), 1, 0))",
    "living on without its parent": C + "need(libc.prctl(1, 0, 0, 0, 0))",
    "more processor time": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, resource.getrlimit(resource.RLIMIT_CPU))",
    "a handler for the end of its time": "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)",
    "another folder": "import os\nos.chdir('HOME')",
    "a file in memory": "import os\nos.memfd_create('x')",
    "a pipe": "import os\nos.pipe()",
    "a copy of a descriptor": "import os\nos.dup(1)",
}
GREED = {
    "a block": "found = bytearray(400 * 2**20)",
    "many small ones": "found = [bytes(10_000) for _ in range(40_000)]",
    "by C": C + "libc.malloc.restype = ctypes.c_void_p\nassert libc.malloc(ctypes.c_size_t(400 * 2**20))",
    "a mapping": "import mmap\nfound = mmap.mmap(-1, 400 * 2**20)",
    "a string": "found = 'x' * (400 * 2**20)",
}
ENDLESS = {
    "a loop": "while True:\n    pass",
    "a loop that catches everything": "while True:\n    try:\n        while True:\n            pass\n"
    "    except BaseException:\n        pass",
    "a loop in C": "sum(range(10**18))",
    "an expression that looks back": "import re\nre.match(r'(a+)+b', 'a' * 64)",
    "a great number": "x = 3 ** (5 * 10**7)",
    "sleep": "import time\ntime.sleep(10**6)",
    "sleep without a pipe": "import io, time\nfor number in range(999):\n    for mode in 'rw':\n        try:\n"
    "            io.FileIO(number, mode).close()\n        except (OSError, ValueError):\n            pass\ntime.sleep(10**6)",
    "a lock": "import _thread\nlock = _thread.allocate_lock()\nlock.acquire()\nlock.acquire()",
    "an end that never comes": "class Slow:\n    def __del__(self):\n        while True:\n            pass\nSlow()",
}
CHATTER = {
    "printed": "while True:\n    print('x' * 1000)",
    "as errors": "import sys\nwhile True:\n    sys.stderr.write('x' * 1000)",
    "on all descriptors": "import os\nwhile True:\n    for number in range(1, 999):\n        try:\n"
    "            os.write(number, b'x' * 1000)\n        except OSError:\n            pass",
    "one long line": "print('x' * 10_000_000)",
}
# `f` is asked for 2 doubled and 5 doubled, and gives neither; yet it would be said to have passed
FORGED = {
    "an exit": "import os\nprint('pass')\nos._exit(0)",
    "a polite exit": "print('pass')\nraise SystemExit(0)",
    "an exit when asked": "import os\ndef f(x):\n    print('pass', flush=True)\n    os._exit(0)",
    "equal to everything": "class All:\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return All()",
    "a number that is equal to everything": "class All(int):\n    def __eq__(self, other):\n        return True\n"
    "    def __repr__(self):\n        return '10'\ndef f(x):\n    return All(1)",
    "the caller's expectation": "import sys\ndef f(x):\n    at = sys._getframe()\n    while at:\n"
    "        for names in (at.f_locals, at.f_globals):\n            if 'expected' in names:\n"
    "                return names['expected'][x]\n        at = at.f_back",
    "a check that is replaced": "def check(*a):\n    pass\ndef written(v):\n    return '10'\ndef f(x):\n    return 0",
    "an end that says it": "import atexit, os\natexit.register(lambda: os._exit(0))\nprint('pass')\ndef f(x):\n    return 0",
}
EVERY = {
    f"{kind}: {name}": program + _TELL
    for kind, some in (
        ("process", PROCESSES),
        ("read", READ),
        ("network", NETWORK),
        ("power", POWERS),
        ("memory", GREED),
    )
    for name, program in some.items()
}
