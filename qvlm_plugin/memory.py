"""What the process keeps of memory that is free."""

import psutil


def trim_heap() -> None:
    """Give freed memory back to the system.

    The C library keeps freed blocks of up to some megabytes for later use, and packed tensors that come to lie between
    them keep it from using them for larger ones: a model that is quantized tensor by tensor would take almost twice the
    memory of its weights. Takes well below a millisecond when there is nothing to give back.
    """
    if hasattr(psutil, "heap_trim"):  # not with every C library
        psutil.heap_trim()
