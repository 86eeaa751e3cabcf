"""Squares in finite fields, as far as Hadamard matrices need them. Letters: p prime, k degree, q = p^k."""

from itertools import product

import torch
from torch import Tensor

__all__ = ["prime_power", "residue_matrix"]


def prime_power(number: int) -> tuple[int, int] | None:
    """(p, k) with number = p^k, or None where there is no such prime p."""
    prime = next((d for d in range(2, int(number**0.5) + 1) if number % d == 0), number)
    degree = 0
    while prime > 1 and number % prime == 0:
        number, degree = number // prime, degree + 1
    return (prime, degree) if number == 1 and degree else None


def residue_matrix(order: int) -> Tensor:
    """Q[a, b] = chi(a - b) over GF(q), q odd: 1 where the difference is a square, -1 where it is none, 0 where a = b.

    Returns:
        (q, q) int8. It is symmetric for q = 1 mod 4 and antisymmetric for q = 3 mod 4.

    Raises:
        ValueError: q is no power of an odd prime.
    """
    found = prime_power(order)
    if found is None or found[0] == 2:
        raise ValueError(f"{order} is no power of an odd prime")
    prime, degree = found
    place = prime ** torch.arange(degree, device="cpu")
    elements = torch.arange(order, device="cpu")[:, None] // place % prime  # (q, k) coefficients, the lowest first
    is_square = torch.full((order,), -1, dtype=torch.int8, device="cpu")
    is_square[_squares(elements, place, prime)] = 1
    is_square[0] = 0
    differences = (elements[:, None] - elements[None]) % prime
    return is_square[differences @ place]


def _squares(elements: Tensor, place: Tensor, prime: int) -> Tensor:
    """Numbers (q,) of the squares of all elements (q, k), modulo the first polynomial that makes a field.

    Modulo a reducible polynomial some square other than 0 has more than two roots, or 0 has more than one, so that
    fewer than (q + 1) / 2 squares remain: counting them tells whether a polynomial is irreducible.
    """
    order, degree = elements.shape
    for low in product(range(prime), repeat=degree):
        squares = _squares_modulo(elements, torch.tensor(low, device="cpu"), prime) @ place
        if torch.bincount(squares, minlength=order).count_nonzero() == (order + 1) // 2:
            return squares
    raise ValueError(f"no irreducible polynomial of degree {degree} over GF({prime})")


def _squares_modulo(elements: Tensor, low: Tensor, prime: int) -> Tensor:
    """Squares (q, k) modulo x^k + low(x), low (k,)."""
    degree = elements.shape[1]
    full = torch.zeros(len(elements), 2 * degree - 1, dtype=torch.int64, device="cpu")
    for i in range(degree):
        full[:, i : i + degree] += elements[:, i : i + 1] * elements
    for power in range(2 * degree - 2, degree - 1, -1):  # x^power = -low(x) x^(power - k)
        full[:, power - degree : power] -= full[:, power : power + 1] * low
        full %= prime
    return full[:, :degree] % prime
