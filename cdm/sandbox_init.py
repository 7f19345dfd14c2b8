"""The inside of `cdm.sandbox`: a script that shuts itself in and then runs a program. Standard library only (layer 2).

    python -I -S sandbox_init.py PARENT PYTHON_PREFIX PYTHON STATUS_FD LIMITS < program

New namespaces for users, mounts, processes, network, IPC and the host's name; a root folder of its own in memory with
the interpreter and the C libraries, read-only, and one writable folder of limited size; no /proc, no capabilities, no
way to another user namespace (the kernel refuses it to whoever is below `chroot`). STATUS_FD gets `ready`, then the
program's wait status; or what of this does not work here. Linux 5.12 or newer. See namespaces(7), mount_setattr(2),
pivot_root(2).
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from typing import Any

# <linux/sched.h>
NEW_NAMESPACES = {
    "user": 0x10000000, "mount": 0x20000, "process": 0x20000000, "network": 0x40000000, "IPC": 0x08000000,
    "host name": 0x04000000,
}  # fmt: skip
# <linux/mount.h>
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 0x4000, 1 << 18, 2
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
OPEN_TREE, MOVE_MOUNT, MOUNT_SETATTR = 428, 429, 442  # these system calls have one number everywhere
OPEN_TREE_CLONE, AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE, MOVE_MOUNT_F_EMPTY_PATH = 1, -100, 0x1000, 0x8000, 4
# <linux/prctl.h>
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
CAPABILITY_VERSION_3, LAST_CAPABILITY = 0x20080522, 63

# <linux/seccomp.h>, <linux/filter.h>, <linux/audit.h>
SECCOMP_MODE_FILTER, KILL, REFUSE, ALLOW = 2, 0x80000000, 0x00050001, 0x7FFF0000  # REFUSE: EPERM
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
X32_CALLS = 0x40000000  # system calls of x86-64 with 32-bit pointers begin here

NOBODY = 65534
STAGE = "/tmp"  # the new root is put together below it; nobody outside sees this
DEVICES = ("null", "zero", "full", "random", "urandom")
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")

# What no program needs: memory that no limit counts (that of System V lives on when nobody has it), and parts of
# the kernel that faults were often found in.
REFUSED = {  # machine: (its name in the kernel's audit, numbers)
    "x86_64": (0xC000003E, {
        "shmget": 29, "semget": 64, "msgget": 68, "ptrace": 101, "add_key": 248, "request_key": 249, "keyctl": 250,
        "perf_event_open": 298, "process_vm_readv": 310, "process_vm_writev": 311, "memfd_create": 319, "bpf": 321,
        "userfaultfd": 323, "io_uring_setup": 425, "memfd_secret": 447,
    }),
    "aarch64": (0xC00000B7, {
        "shmget": 194, "semget": 190, "msgget": 186, "ptrace": 117, "add_key": 217, "request_key": 218, "keyctl": 219,
        "perf_event_open": 241, "process_vm_readv": 270, "process_vm_writev": 271, "memfd_create": 279, "bpf": 280,
        "userfaultfd": 282, "io_uring_setup": 425, "memfd_secret": 447,
    }),
}  # fmt: skip

libc = ctypes.CDLL(None, use_errno=True)


class Attributes(ctypes.Structure):
    """struct mount_attr."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


class Instruction(ctypes.Structure):
    """struct sock_filter."""

    _fields_ = [("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("k", ctypes.c_uint32)]


class Filter(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("count", ctypes.c_uint16), ("instructions", ctypes.POINTER(Instruction))]


def call(name: str, *arguments: Any) -> int:
    """A function of the C library. Raises OSError naming it."""
    found = int(getattr(libc, name)(*arguments))
    if found < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return found


# --- namespaces --------------------------------------------------------------------------------------------------


def new_namespaces() -> None:
    """This process into a user namespace and more; inside it, the program's user is `NOBODY`.

    Root's processes are not counted by the kernel, so as root the program becomes another user outside too.
    """
    user, group = os.geteuid(), os.getegid()
    flags = 0
    for flag in NEW_NAMESPACES.values():
        flags |= flag
    if user == 0:
        os.setgroups([])
        mapped = f"0 0 1\n{NOBODY} {NOBODY} 1\n"
        _by_a_process_outside(lambda: call("unshare", flags), mapped)
    else:
        call("unshare", flags)
        for file, line in (
            ("setgroups", "deny"),
            ("uid_map", f"{NOBODY} {user} 1"),
            ("gid_map", f"{NOBODY} {group} 1"),
        ):
            _write(f"/proc/self/{file}", line)


def _by_a_process_outside(unshare: Callable[[], int], mapped: str) -> None:
    """Only a privileged process of the outer namespace may map several users."""
    me = os.getpid()
    wait, go = os.pipe()
    helper = os.fork()
    if helper == 0:
        os.close(go)
        if os.read(wait, 1):
            for file in ("uid_map", "gid_map"):
                _write(f"/proc/{me}/{file}", mapped)
            os._exit(0)
        os._exit(1)
    os.close(wait)
    try:
        unshare()
        os.write(go, b".")
    finally:
        os.close(go)
        status = os.waitpid(helper, 0)[1]
    if status:
        raise OSError("the users of the new namespace could not be mapped")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


# --- the root folder ---------------------------------------------------------------------------------------------


def tree(path: str) -> int:
    """A copy of a mount from `path` down, not attached anywhere, read-only."""
    found = call("syscall", OPEN_TREE, AT_FDCWD, path.encode(), OPEN_TREE_CLONE | AT_RECURSIVE | os.O_CLOEXEC)
    wanted = Attributes(set=ATTR_RDONLY | ATTR_NOSUID | (0 if path.startswith("/dev/") else ATTR_NODEV))
    arguments = (found, b"", AT_EMPTY_PATH | AT_RECURSIVE, ctypes.byref(wanted), ctypes.sizeof(wanted))
    call("syscall", MOUNT_SETATTR, *arguments)
    return found


def attach(mounted: int, path: str) -> None:
    call("syscall", MOVE_MOUNT, mounted, b"", AT_FDCWD, path.encode(), MOVE_MOUNT_F_EMPTY_PATH)


def new_root(prefix: str, python: str, program: bytes, size: int) -> None:
    """This process's root: interpreter, C libraries, five devices, and /box with the program, of `size` bytes."""
    call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    trees = {"python/lib": tree(f"{prefix}/lib"), "python/bin/python": tree(python)}
    trees |= {f"dev/{name}": tree(f"/dev/{name}") for name in DEVICES}
    links = {}
    for library in LIBRARIES:
        if os.path.islink(library):
            links[library[1:]] = os.readlink(library)
        elif os.path.isdir(library):
            trees[library[1:]] = tree(library)
    if os.path.exists("/etc/ld.so.cache"):
        trees["etc/ld.so.cache"] = tree("/etc/ld.so.cache")

    flags = MS_NOSUID | MS_NODEV
    call("mount", b"tmpfs", STAGE.encode(), b"tmpfs", flags, b"size=1m,mode=755")
    inner = f"{STAGE}/jail"
    for place, mounted in trees.items():
        path = f"{inner}/{place}"
        if place.startswith(("dev/", "etc/", "python/bin/")):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
        else:
            os.makedirs(path, exist_ok=True)
        attach(mounted, path)
        os.close(mounted)
    for place, target in links.items():
        os.symlink(target, f"{inner}/{place}")
    os.mkdir(f"{inner}/box")
    os.mkdir(f"{inner}/old")
    call("mount", b"tmpfs", f"{inner}/box".encode(), b"tmpfs", flags, f"size={size},nr_inodes=4096,mode=700".encode())
    with open(f"{inner}/box/program.py", "wb") as file:
        file.write(program)
    os.chown(f"{inner}/box", NOBODY, NOBODY)
    os.symlink("box", f"{inner}/tmp")

    call("pivot_root", STAGE.encode(), f"{inner}/old".encode())
    call("umount2", b"/jail/old", MNT_DETACH)
    os.rmdir("/jail/old")
    wanted = Attributes(set=ATTR_RDONLY)
    call("syscall", MOUNT_SETATTR, AT_FDCWD, b"/", 0, ctypes.byref(wanted), ctypes.sizeof(wanted))
    os.chroot("/jail")
    os.chdir("/box")


def no_privileges() -> None:
    """For this process and all that it starts."""
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for capability in range(LAST_CAPABILITY + 1):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # EINVAL beyond the last one that this kernel knows
    if os.geteuid() != NOBODY:
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    call("capset", header, (ctypes.c_uint32 * 6)())
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    refuse_calls()


def refuse_calls() -> None:
    """System calls of REFUSED fail with EPERM; those of another machine's numbering kill."""
    machine = os.uname().machine
    if machine not in REFUSED:
        raise OSError(f"system calls of {machine} are not known")
    audit, numbers = REFUSED[machine]
    lines = [(LOAD, 0, 0, 4), (JUMP_EQUAL, 1, 0, audit), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]  # 4, 0: machine, number
    lines += [(JUMP_AT_LEAST, 0, 1, X32_CALLS), (RETURN, 0, 0, KILL)]
    for number in numbers.values():
        lines += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE)]
    lines.append((RETURN, 0, 0, ALLOW))
    instructions = (Instruction * len(lines))(*(Instruction(*line) for line in lines))
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(Filter(len(lines), instructions)), 0, 0)


# --- the program -------------------------------------------------------------------------------------------------


def limit(limits: dict[str, int]) -> None:
    """Of each process: CPU seconds, bytes of address space and of a file; of all of them: how many there are."""
    wanted = {
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_AS: limits["memory"],
        resource.RLIMIT_FSIZE: limits["file_size"],
        resource.RLIMIT_NPROC: limits["processes"],
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for kind, most in wanted.items():
        resource.setrlimit(kind, (most, most))


def first_process(prefix: str, python: str, status: int, alive: int, limits: dict[str, int]) -> None:
    """Process 1 of the new namespace: when it ends, the kernel ends all others.

    `alive` is readable once nobody waits for it any more.
    """
    new_root(prefix, python, sys.stdin.buffer.read(), limits["folder_size"])
    no_privileges()
    if select.select([alive], [], [], 0)[0]:  # the signal of the parent's death would have come before it was asked for
        os._exit(1)
    os.write(status, b"ready\n")
    program = os.fork()
    if program == 0:
        os.close(status)
        os.close(alive)
        os.setsid()  # a signal to its own group stays inside
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        limit(limits)
        environment = {"HOME": "/box", "LANG": "C.UTF-8", "LD_LIBRARY_PATH": "/python/lib", "PYTHONHASHSEED": "0"}
        os.execve("/python/bin/python", ["/python/bin/python", "-I", "-S", "-B", "program.py"], environment)
    while True:
        ended, code = os.wait()
        if ended == program:
            os.write(status, f"{code}\n".encode())
            os._exit(0)


def main(parent: str, prefix: str, python: str, status_text: str, limits_text: str) -> None:
    status = int(status_text)
    os.set_inheritable(status, False)
    try:
        new_namespaces()
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != int(parent):
            os._exit(1)
        alive, held = os.pipe()
        first = os.fork()
        if first == 0:
            os.close(held)
            first_process(prefix, python, status, alive, json.loads(limits_text))
        signal.signal(signal.SIGTERM, lambda *_: os.kill(first, signal.SIGKILL))
    except OSError as error:
        os.write(status, f"{error}\n".encode())
        os._exit(1)
    os.waitpid(first, 0)  # returns when the last process inside has ended


if __name__ == "__main__":
    main(*sys.argv[1:])
