"""Hadamard matrices: square, with entries 1 and -1 and orthogonal rows.

Sylvester's construction gives the powers of two. Paley's (1933) gives order q + 1 for prime powers q = 3 mod 4, and
2 (q + 1) for q = 1 mod 4: among others 12, 20, 28, 36, 76, 108 and 140, which the widths of models need. Williamson's
(1944) gives 172, for widths of 43 times a power of two, such as the 11,008 of LLaMA-7B.
"""

from functools import cache
from itertools import product

import torch
from torch import Tensor

Element = tuple[int, ...]
"""An element of a finite field of p^k: coefficients of a polynomial of degree below k, the lowest first."""


def sylvester(power: int) -> Tensor:
    """Sylvester's symmetric matrix of order 2^power: float32."""
    matrix = torch.ones(1, 1)
    for _ in range(power):
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix


def has_hadamard(order: int) -> bool:
    """Whether `hadamard` has a matrix of this order."""
    return order in _WILLIAMSON or _has_paley(order)


@cache
@torch.inference_mode(False)
def hadamard(order: int) -> Tensor:
    """The matrix of an order for which `has_hadamard` is true: float32. All callers get the same tensor."""
    if not has_hadamard(order):
        raise ValueError(f"no Hadamard matrix of order {order} is known here")
    return _williamson(order) if order in _WILLIAMSON else _paley(order)


_WILLIAMSON = {172: ((43, 3), ("++++---", "-++--+-", "-+-+++-", "--++-++"))}
"""The prime n with a primitive root, and the signs of the classes for each circulant (see `_williamson`), by order 4n.
Found by trying all signs."""


def _williamson(order: int) -> Tensor:
    """Williamson's array of four symmetric circulant matrices, whose squares sum to ``order`` times the identity.

    In the first row of a circulant, entry 0 is 1; entry ``root^k mod n`` has the sign of the class of k modulo the
    number of classes.
    """
    (n, root), of_circulants = _WILLIAMSON[order]
    index = torch.arange(n)
    circulants = []
    for signs in of_circulants:
        row = torch.ones(n)
        for power in range(n - 1):
            row[pow(root, power, n)] = 1.0 if signs[power % len(signs)] == "+" else -1.0
        circulants.append(row[(index - index[:, None]) % n])
    a, b, c, d = circulants
    rows = ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))
    return torch.cat([torch.cat(row, dim=1) for row in rows])


def _has_paley(order: int) -> bool:
    return order % 4 == 0 and (_field(order - 1) is not None or _second_kind(order))


def _paley(order: int) -> Tensor:
    if _field(order - 1) is not None:
        return torch.eye(order) + _bordered(order - 1, -1.0)
    conference, unit = _bordered(order // 2 - 1, 1.0), torch.eye(order // 2)
    return torch.kron(conference, torch.tensor([[1.0, 1], [1, -1]])) + torch.kron(
        unit, torch.tensor([[1.0, -1], [-1, -1]])
    )


def _second_kind(order: int) -> bool:
    q = order // 2 - 1
    return q % 4 == 1 and _field(q) is not None


def _bordered(q: int, first_column: float) -> Tensor:
    """The Jacobsthal matrix of a field of q elements, with a first row of ones and a constant first column.

    An entry is 1 if the difference of two elements is a square other than 0, -1 if it is no square, and 0 if it is 0.
    """
    matrix = torch.zeros(q + 1, q + 1)
    matrix[0, 1:], matrix[1:, 0] = 1.0, first_column
    prime, degree = _field(q)
    elements = [*product(range(prime), repeat=degree)]
    squares = {_square(element, prime) for element in elements}
    values = {element: (0.0 if not any(element) else 1.0 if element in squares else -1.0) for element in elements}
    for row, a in enumerate(elements, 1):
        differences = (tuple((x - y) % prime for x, y in zip(a, b, strict=True)) for b in elements)
        matrix[row, 1:] = torch.tensor([values[difference] for difference in differences])
    return matrix


@cache
def _field(q: int) -> tuple[int, int] | None:
    """(p, k) for q = p^k with an odd prime p and k up to 3; None if q is no such power."""
    for degree in (1, 2, 3):
        prime = round(q ** (1 / degree))
        if prime**degree == q and prime > 2 and all(prime % divisor for divisor in range(2, int(prime**0.5) + 1)):
            return prime, degree
    return None


def _square(element: Element, prime: int) -> Element:
    """The square of a field element, modulo `_irreducible`."""
    degree = len(element)
    found = [0] * (2 * degree - 1)
    for (i, a), (j, b) in product(enumerate(element), repeat=2):
        found[i + j] += a * b
    lower = _irreducible(prime, degree)
    for power in range(2 * degree - 2, degree - 1, -1):
        for exponent, coefficient in enumerate(lower):
            found[power - degree + exponent] -= found[power] * coefficient
    return tuple(value % prime for value in found[:degree])


@cache
def _irreducible(prime: int, degree: int) -> Element:
    """All but the leading coefficient of a monic polynomial without roots: up to degree 3 such are irreducible."""
    for lower in product(range(prime), repeat=degree):
        values = (x**degree + sum(c * x**exponent for exponent, c in enumerate(lower)) for x in range(prime))
        if degree == 1 or all(value % prime for value in values):
            return lower
    raise AssertionError("every finite field has irreducible polynomials of every degree")
