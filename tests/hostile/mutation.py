"""Hostile variants of good files: edits of JSON documents and of bytes, as hypothesis strategies."""

import copy
import json

from hypothesis import strategies as st

DEEP = "[" * 3_000
"""Deeper than Python's parsers go."""

NUMBER = "7" * 5_000
"""More digits than Python converts."""

VALUES = st.sampled_from(
    [
        None, True, False, -1, 0, 1, 3, 2**31, 2**63, -(2**64), 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"),
        "", " ", "none", "..", "../../secret", "/etc/passwd", "a\0b", "\ud800", "²", "٣", "\u2028", "x" * 2_000,
        "float32[99999999999,99999999999]", "Tensor[]", "%s{}", "<script>", "__class__", [], {}, [[]], [None], {"": {}},
        ["../secret"], {"a": 1}, {"__reduce__": ["os.system"]}, [[[[[[]]]]]],
    ]
).map(copy.deepcopy)  # fmt: skip

_STEPS = st.lists(st.integers(0, 40), max_size=8)


@st.composite
def edited(draw, document, most=3):
    """A JSON document with a few values replaced, removed, added, doubled or swapped."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, most))):
        holder, key = _walk(document, draw(_STEPS))
        if holder is None:
            return draw(VALUES)
        action = draw(st.sampled_from(["replace", "replace", "remove", "add", "double", "swap"]))
        if action == "replace":
            holder[key] = draw(VALUES)
        elif action == "remove":
            del holder[key]
        elif action == "add" and isinstance(holder, dict):
            holder[draw(st.text(max_size=5))] = draw(VALUES)
        elif action == "swap" and isinstance(holder, dict):
            other = sorted(holder)[draw(st.integers(0, len(holder) - 1))]
            holder[key], holder[other] = holder[other], holder[key]
        elif isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
    return document


@st.composite
def texts(draw, document, most=3):
    """The text of a JSON file: edited as a document, and now and then as text."""
    text = json.dumps(draw(edited(document, most)))
    action = draw(st.integers(0, 19))
    if action == 0:
        return text[: draw(st.integers(0, len(text)))]
    if action == 1:
        return text.replace("1", NUMBER, 1)
    if action == 2:
        return text.replace("{", DEEP, 1)
    if action == 3:
        at = draw(st.integers(0, len(text)))
        return text[:at] + draw(st.text(max_size=6)) + text[at:]
    return text


@st.composite
def blobs(draw, content):
    """A file's content: some bytes overwritten, inserted or cut off."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        # Most of a binary format's structure is at its beginning.
        at = draw(st.integers(0, min(len(content), 400) if draw(st.booleans()) else len(content)))
        action = draw(st.sampled_from(["overwrite", "overwrite", "insert", "cut"]))
        more = draw(st.binary(max_size=8))
        if action == "cut":
            del content[at:]
        else:
            content[at : at + (len(more) if action == "overwrite" else 0)] = more
    return bytes(content)


def _walk(document, steps):
    """A container in the document and a key of it, as far down as the steps lead."""
    holder, key = None, None
    for step in [*steps, 0]:
        inner = document if holder is None else holder[key]
        if not isinstance(inner, dict | list) or not inner:
            break
        keys = sorted(inner) if isinstance(inner, dict) else range(len(inner))
        holder, key = inner, keys[step % len(keys)]
    return holder, key
