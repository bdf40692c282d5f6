"""The few calls of the CUDA driver that green contexts need, through ctypes: no package brings all of them."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_ubyte, c_uint, c_void_p
from functools import cache

_SM = 1  # CU_DEV_RESOURCE_TYPE_SM
_DEFAULT_STREAM = 1  # CU_GREEN_CTX_DEFAULT_STREAM, which creation demands
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_PADDING, _UNION = 92, 48  # of CUdevResource: its size is part of the driver's ABI


class DriverError(RuntimeError):
    """The driver refused, or has no such function."""


class Resource(ctypes.Structure):
    """``CUdevResource`` of type SM: a set of SMs, of which the driver alone knows which they are."""

    _fields_ = [
        ("type", c_int),
        ("internal", c_ubyte * _PADDING),
        ("sm_count", c_uint),
        ("rest", c_ubyte * (_UNION - ctypes.sizeof(c_uint))),
    ]


_ARGUMENTS = {
    "cuInit": [c_uint],
    "cuDriverGetVersion": [POINTER(c_int)],
    "cuGetErrorString": [c_int, POINTER(c_char_p)],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDeviceGetDevResource": [c_int, POINTER(Resource), c_int],
    "cuDevSmResourceSplitByCount": [
        POINTER(Resource), POINTER(c_uint), POINTER(Resource), POINTER(Resource), c_uint, c_uint,
    ],
    "cuDevResourceGenerateDesc": [POINTER(c_void_p), POINTER(Resource), c_uint],
    "cuGreenCtxCreate": [POINTER(c_void_p), c_void_p, c_int, c_uint],
    "cuGreenCtxDestroy": [c_void_p],
    "cuGreenCtxGetDevResource": [c_void_p, POINTER(Resource), c_int],
    "cuGreenCtxStreamCreate": [POINTER(c_void_p), c_void_p, c_uint, c_int],
    "cuStreamCreate": [POINTER(c_void_p), c_uint],
    "cuStreamDestroy_v2": [c_void_p],
    "cuStreamGetGreenCtx": [c_void_p, POINTER(c_void_p)],
}  # fmt: skip


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DriverError(f"no CUDA driver: {error}") from None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name, None)
        if function is None:
            raise DriverError(f"the CUDA driver has no {name}; green contexts need one of CUDA 12.5")
        function.argtypes, function.restype = arguments, c_int
    return library


def _call(name: str, *arguments: object) -> None:
    library = _library()
    code = getattr(library, name)(*arguments)
    if code:
        told = c_char_p()
        library.cuGetErrorString(code, byref(told))
        raise DriverError(f"{name}: error {code}, {(told.value or b'unknown').decode()}")


def version() -> int:
    """CUDA version of the driver: 13000 for 13.0.

    Raises
    ------
    DriverError
        If there is no driver, or one without green contexts.
    """
    found = c_int()
    _call("cuDriverGetVersion", byref(found))
    return found.value


def device_resource(index: int) -> tuple[int, Resource]:
    """Handle and all SMs of a device."""
    device, resource = c_int(), Resource()
    _call("cuInit", 0)
    _call("cuDeviceGet", byref(device), index)
    _call("cuDeviceGetDevResource", device, byref(resource), _SM)
    return device.value, resource


def take(resource: Resource, sms: int) -> tuple[Resource, Resource]:
    """A group of at least ``sms`` SMs out of a set, and those that remain."""
    group, rest, groups = Resource(), Resource(), c_uint(1)
    _call("cuDevSmResourceSplitByCount", byref(group), byref(groups), byref(resource), byref(rest), 0, sms)
    if groups.value != 1:
        raise DriverError(f"cuDevSmResourceSplitByCount: no group of {sms} SMs")
    return group, rest


def green_context(device: int, resource: Resource) -> int:
    """A green context on a set of SMs."""
    description, context = c_void_p(), c_void_p()
    _call("cuDevResourceGenerateDesc", byref(description), byref(resource), 1)
    _call("cuGreenCtxCreate", byref(context), description, device, _DEFAULT_STREAM)
    return int(context.value or 0)


def context_resource(context: int) -> Resource:
    """The SMs of a green context; these, unlike the parts of a split, can be split again."""
    resource = Resource()
    _call("cuGreenCtxGetDevResource", c_void_p(context), byref(resource), _SM)
    return resource


def destroy_context(context: int) -> None:
    """Give a green context back; nothing may run on its streams any more."""
    _call("cuGreenCtxDestroy", c_void_p(context))


def context_stream(context: int) -> int:
    """A stream of a green context that does not wait for the default stream."""
    stream = c_void_p()
    _call("cuGreenCtxStreamCreate", byref(stream), c_void_p(context), _NON_BLOCKING, 0)
    return int(stream.value or 0)


def current_stream() -> int:
    """A stream of the context that is current on this thread."""
    stream = c_void_p()
    _call("cuStreamCreate", byref(stream), _NON_BLOCKING)
    return int(stream.value or 0)


def destroy_stream(stream: int) -> None:
    """Give a stream back."""
    _call("cuStreamDestroy_v2", c_void_p(stream))


def context_of(stream: int) -> int | None:
    """The green context of a stream, ``None`` for a stream of the whole device."""
    context = c_void_p()
    _call("cuStreamGetGreenCtx", c_void_p(stream), byref(context))
    return context.value


def sms_of(stream: int) -> int | None:
    """SMs that the kernels of a stream may use, ``None`` for those of the whole device."""
    context = context_of(stream)
    return None if context is None else int(context_resource(context).sm_count)
