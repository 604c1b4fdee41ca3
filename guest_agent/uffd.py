"""Registration side of userfaultfd write protection, and the probe that says whether this kernel has it.

Rule 1: only what the guest process must do itself is here: create, agree on features, register its mapping.
        Scanning belongs to whoever holds the pagemap descriptor.
Rule 2: /dev/userfaultfd is tried before the system call: container engines block the call by default, and a
        device node is a permission an operator can give (userfaultfd(2),
        Documentation/admin-guide/mm/userfaultfd.rst).
Rule 3: errors are the kernel's own OSError; what they mean for a run is decided by the caller.
"""

import ctypes
import fcntl
import os
import struct
from typing import Final

USERFAULTFD_DEVICE: Final = "/dev/userfaultfd"
UFFD_USER_MODE_ONLY: Final = 1
SYSCALL_USERFAULTFD: Final = {"x86_64": 323, "aarch64": 282, "riscv64": 282}

_UFFD_TYPE: Final = 0xAA
_IOC_READ: Final = 2
_IOC_WRITE: Final = 1


def _ioc(direction: int, kind: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | kind << 8 | number


# include/uapi/linux/userfaultfd.h
USERFAULTFD_IOC_NEW: Final = _ioc(0, _UFFD_TYPE, 0x00, 0)
UFFDIO_API: Final = _ioc(_IOC_READ | _IOC_WRITE, _UFFD_TYPE, 0x3F, 24)
UFFDIO_REGISTER: Final = _ioc(_IOC_READ | _IOC_WRITE, _UFFD_TYPE, 0x00, 32)
UFFD_API: Final = 0xAA
UFFD_FEATURE_WP_HUGETLBFS_SHMEM: Final = 1 << 12
UFFD_FEATURE_WP_UNPOPULATED: Final = 1 << 13
UFFD_FEATURE_WP_ASYNC: Final = 1 << 15
UFFDIO_REGISTER_MODE_WP: Final = 1 << 1

# include/uapi/linux/fs.h, since Linux 6.7
PAGEMAP_SCAN: Final = _ioc(_IOC_READ | _IOC_WRITE, ord("f"), 16, 96)
PAGE_IS_WRITTEN: Final = 1 << 1

_API: Final = struct.Struct("=QQQ")  # api, features, ioctls
_REGISTER: Final = struct.Struct("=QQQQ")  # start, length, mode, ioctls
_SCAN: Final = struct.Struct("=12Q")  # size, flags, start, end, walk_end, vec, vec_len, max_pages, 4 masks
assert (_API.size, _REGISTER.size, _SCAN.size) == (24, 32, 96)


def open_userfaultfd() -> int:
    """Create a userfaultfd: through the device, else through the system call.

    Returns:
        a descriptor that the caller closes.

    Raises:
        OSError: neither way is open to this process.
    """
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        device = os.open(USERFAULTFD_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as unavailable:
        # Faults of the kernel itself need a privilege only where a handler must answer them. Asynchronous
        # write protection has no handler, so what anybody may have is enough.
        return _open_by_syscall(flags | UFFD_USER_MODE_ONLY, unavailable)
    try:
        return fcntl.ioctl(device, USERFAULTFD_IOC_NEW, flags)
    finally:
        os.close(device)


def _open_by_syscall(flags: int, device_error: OSError) -> int:
    number = SYSCALL_USERFAULTFD.get(os.uname().machine)
    if number is None:
        raise device_error
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.syscall(number, flags))
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"userfaultfd: {os.strerror(code)} (and {device_error})")
    return fd


def enable_async_write_protect(fd: int) -> None:
    """Agree on asynchronous write protection of shared memory, unpopulated pages included.

    Raises:
        OSError: the kernel lacks one of the features (EINVAL), or fd was already set up.
    """
    features = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    fcntl.ioctl(fd, UFFDIO_API, bytearray(_API.pack(UFFD_API, features, 0)))


def register_write_protect(fd: int, address: int, length: int) -> None:
    """Register [address, address + length) of this process for write protection.

    Raises:
        OSError: the range is not one mapping, or another userfaultfd has it.
    """
    fcntl.ioctl(fd, UFFDIO_REGISTER, bytearray(_REGISTER.pack(address, length, UFFDIO_REGISTER_MODE_WP, 0)))


def probe_pagemap_scan(pagemap_fd: int, address: int, length: int) -> None:
    """Ask for one page's state, changing nothing.

    Raises:
        OSError: the kernel has no PAGEMAP_SCAN (ENOTTY before Linux 6.7).
    """
    one_region = ctypes.create_string_buffer(24)
    request = _SCAN.pack(
        _SCAN.size, 0, address, address + length, 0, ctypes.addressof(one_region), 1, 1,
        0, PAGE_IS_WRITTEN, 0, PAGE_IS_WRITTEN,
    )  # fmt: skip
    fcntl.ioctl(pagemap_fd, PAGEMAP_SCAN, bytearray(request))
