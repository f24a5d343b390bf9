"""Products as operators that torch.compile does not trace into: it cannot trace private operators or other packages."""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

Product = Callable[..., Tensor]


def operator(
    name: str,
    like: Product,
    schema: str | None = None,
    traceable: Callable[..., bool] = lambda *_: False,
) -> Callable[[Product], Product]:
    """Register a function of tensors as the operator ``qvlm_plugin::name``, which is used when torch compiles.

    Otherwise the function is called directly, which takes less time.

    Args:
        name: name of the operator.
        like: the function's arguments → an empty tensor of the result's shape and dtype, for the compiler.
        schema: the function's schema, if older versions of torch cannot read it from the annotations
            (``list[Tensor]``).
        traceable: the function's arguments → whether torch.compile traces the function after all. For short calls it
            should: calling the operator takes 25 microseconds on a CPU, and it is not fused with what follows.
    """

    def register(function: Product) -> Product:
        registered = torch.library.custom_op(f"qvlm_plugin::{name}", function, mutates_args=(), schema=schema)
        registered.register_fake(like)

        @wraps(function)
        def call(*arguments: object) -> Tensor:
            opaque = torch.compiler.is_compiling() and not traceable(*arguments)
            return (registered if opaque else function)(*arguments)

        return call

    return register
