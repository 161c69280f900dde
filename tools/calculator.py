"""Arithmetic on exact fractions by a recursive-descent parser: no `eval`; bounded length, depth, size."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from fractions import Fraction

from tools.tool import ToolError

MAX_CHARS = 200
MAX_DEPTH = 20
MAX_BITS = 60  # numerator and denominator of every intermediate result

_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d+)?|\.\d+)|(\*\*|//|>=|<=|==|!=|[-+*/%()<>^=×÷−]))", re.ASCII)
_THOUSANDS = re.compile(r"(?<![\d.])(\d{1,3})((?:,\d{3})+)(?![\d,])", re.ASCII)
_COMPARE: dict[str, Callable[[Fraction, Fraction], bool]] = {
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "=": operator.eq,
    "!=": operator.ne,
}
_SAME = {"×": "*", "÷": "/", "−": "-", "^": "**"}


def calculator(expression: str) -> str:
    """arithmetic

    Args:
        expression: sums, products, powers, or a comparison: "(341 - 87) / 2", "341 > 87".
    """
    if len(expression) > MAX_CHARS:
        raise ToolError(f"expression longer than {MAX_CHARS} characters")
    parser = _Parser(_tokens(expression))
    value = parser.comparison()
    if parser.peek() is not None:
        raise ToolError(f"unexpected {parser.peek()!r}")
    if isinstance(value, bool):
        return "true" if value else "false"
    return _decimal(value)


def _tokens(expression: str) -> list[str]:
    text = _THOUSANDS.sub(lambda m: m.group(0).replace(",", ""), expression)
    tokens: list[str] = []
    position = 0
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None:
            rest = text[position:].strip()
            if not rest:
                break
            raise ToolError(f"cannot read {rest[:20]!r}")
        token = found.group(1) or found.group(2)
        tokens.append(_SAME.get(token, token))
        position = found.end()
    return tokens


class _Parser:
    """comparison: sum [op sum]; sum: product {± product}; product: unary {*/ unary}; unary: -unary | power."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.position, self.depth = tokens, 0, 0

    def peek(self) -> str | None:
        return self.tokens[self.position] if self.position < len(self.tokens) else None

    def take(self) -> str:
        token = self.peek()
        if token is None:
            raise ToolError("expression ends too early")
        self.position += 1
        return token

    def comparison(self) -> Fraction | bool:
        left = self.sum()
        if self.peek() in _COMPARE:
            return _COMPARE[self.take()](left, self.sum())
        return left

    def sum(self) -> Fraction:
        value = self.product()
        while self.peek() in ("+", "-"):
            value = _bounded(value + self.product() if self.take() == "+" else value - self.product())
        return value

    def product(self) -> Fraction:
        value = self.unary()
        while self.peek() in ("*", "/", "//", "%"):
            value = _bounded(_divide_or_multiply(self.take(), value, self.unary()))
        return value

    def unary(self) -> Fraction:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ToolError("expression nested too deep")
        try:
            if self.peek() in ("-", "+"):
                return -self.unary() if self.take() == "-" else self.unary()
            return self.power()
        finally:
            self.depth -= 1

    def power(self) -> Fraction:
        base = self.atom()
        if self.peek() != "**":
            return base
        self.take()
        return _power(base, self.unary())

    def atom(self) -> Fraction:
        token = self.take()
        if token == "(":
            value = self.sum()
            if self.peek() != ")":
                raise ToolError("missing )")
            self.take()
            return value
        if token[0].isdigit() or token[0] == ".":
            return _bounded(Fraction(token))
        raise ToolError(f"unexpected {token!r}")


def _divide_or_multiply(sign: str, left: Fraction, right: Fraction) -> Fraction:
    if sign == "*":
        return left * right
    if right == 0:
        raise ToolError("division by zero")
    return {"/": operator.truediv, "//": lambda a, b: Fraction(a // b), "%": operator.mod}[sign](left, right)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ToolError("only whole exponents")
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) > MAX_BITS or size * abs(exponent) > 2 * MAX_BITS:
        raise ToolError("number too large")
    if base == 0 and exponent < 0:
        raise ToolError("division by zero")
    return _bounded(base ** int(exponent))


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() > MAX_BITS or value.denominator.bit_length() > MAX_BITS:
        raise ToolError("number too large")
    return value


def _decimal(value: Fraction) -> str:
    """Whole numbers plainly, others rounded to six places."""
    if value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.6f}".rstrip("0").rstrip(".")
