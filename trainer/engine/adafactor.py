"""Adafactor (Shazeer and Stern, 2018, arXiv:1804.04235): second moments by row and column.

A matrix's second moments are the product of the means of its rows and of its columns, and there is
no first moment. The means are sums over all ranks, in fp64, so that they do not depend on how ZeRO
cuts a matrix. As transformers' Trainer has it, the learning rate is the recipe's: neither scaled by
the weights nor by the step. An update's root mean square is at most 1, near AdamW's, whose learning
rate and decoupled weight decay it takes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import pad

from packhorse.trainer import dist
from packhorse.trainer.engine.moments import MOMENTS, Beside, Group, Piece, Piecewise, moments_of

_DECAY = -0.8  # beta2 of step t is 1 - t ** _DECAY
_LEAST = 1e-30  # added to squared gradients, so that an expert without tokens divides by no zero
_ROW, _COLUMN = MOMENTS["adafactor"]


class Adafactor(Piecewise):
    """Update matrices by factored second moments; what is no matrix by AdamW.

    The matrices of a parameter are its last two dimensions: an expert each.
    """

    def make_states(self, master: torch.Tensor) -> None:
        pieces, state = self.pieces[id(master)], self.state[master]
        state[_ROW] = master.new_zeros(sum(map(_count_rows, pieces)))
        state[_COLUMN] = master.new_zeros(sum(map(_count_columns, pieces)))

    def states_beside(self, master: torch.Tensor, saves: bool) -> Iterator[Beside]:
        if saves and not dist.is_main():  # every rank has all of them
            return
        rows_columns = self._by_piece(master, self.state[master][_ROW], self.state[master][_COLUMN])
        for number, (rows, columns) in enumerate(rows_columns):
            yield number, "rows", 0, {_ROW: rows}
            yield number, "columns", 0, {_COLUMN: columns}

    def update(self, master: torch.Tensor, gradient: torch.Tensor, group: Group) -> None:
        moments_of(self, master, "adafactor")
        state, pieces = self.state[master], self.pieces[id(master)]
        state["step"] += 1
        weights, gradients = master.view(-1), gradient.view(-1)
        means = [torch.zeros_like(state[name], dtype=torch.float64) for name in (_ROW, _COLUMN)]
        for piece, (rows, columns) in zip(pieces, self._by_piece(master, *means), strict=True):
            if piece.numel:
                _add_squares(piece, gradients, rows, columns)
        self._sum_over_ranks(*means)
        for name, mean in zip((_ROW, _COLUMN), means, strict=True):
            state[name].lerp_(mean.float(), state["step"] ** _DECAY)

        factors = list(self._by_piece(master, state[_ROW], state[_COLUMN]))
        squares = [gradients.new_zeros(_count_matrices(p), dtype=torch.float64) for p in pieces]
        for piece, (rows, columns), square in zip(pieces, factors, squares, strict=True):
            if piece.numel:
                first, update = _update(piece, gradients, rows, columns)
                found = update.square().sum((1, 2), dtype=torch.float64)
                square[first : first + len(found)] = found
        self._sum_over_ranks(*squares)
        weights.mul_(1 - group["lr"] * group["weight_decay"])
        for piece, (rows, columns), square in zip(pieces, factors, squares, strict=True):
            if piece.numel:
                # computed anew, as all updates at once would take as much memory as the gradients
                first, update = _update(piece, gradients, rows, columns)
                size = piece.shape[-2] * piece.shape[-1]
                rms = (square[first : first + len(update)] / size).sqrt().float()
                update /= rms.clamp_min(1.0).view(-1, 1, 1)
                lead = piece.start % _unit(piece)
                part = update.view(-1)[lead : lead + piece.numel]
                weights[piece.offset : piece.offset + piece.numel].sub_(part, alpha=group["lr"])

    def _by_piece(
        self, master: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        pieces = self.pieces[id(master)]
        of_rows = rows.split([_count_rows(piece) for piece in pieces])
        return zip(of_rows, columns.split([_count_columns(piece) for piece in pieces]), strict=True)

    def _sum_over_ranks(self, *parts: torch.Tensor) -> None:
        """Sum float64 tensors over the ranks, in place and in one message."""
        if self.is_sharded:
            whole = torch.cat(parts)
            torch.distributed.all_reduce(whole)
            for part, summed in zip(parts, whole.split([len(p) for p in parts]), strict=True):
                part.copy_(summed)


def _count_matrices(piece: Piece) -> int:
    return torch.Size(piece.shape[:-2]).numel()


def _count_rows(piece: Piece) -> int:
    return torch.Size(piece.shape[:-1]).numel()


def _count_columns(piece: Piece) -> int:
    return _count_matrices(piece) * piece.shape[-1]


def _unit(piece: Piece) -> int:
    """Return the weights that a rank's part is filled up to a multiple of: a row, or an expert."""
    return piece.shape[-1] if _count_matrices(piece) == 1 else piece.shape[-2] * piece.shape[-1]


def _matrices(piece: Piece, gradients: torch.Tensor) -> torch.Tensor:
    """Return the gradients of the matrices that a piece lies in, (K, R, N), zero outside of it.

    K are all R rows of several matrices, or R the rows of a part of one.
    """
    lead, unit = piece.start % _unit(piece), _unit(piece)
    part = gradients[piece.offset : piece.offset + piece.numel]
    whole = pad(part, (lead, -(lead + piece.numel) % unit))
    rows = piece.shape[-2] if _count_matrices(piece) > 1 else len(whole) // unit
    return whole.view(-1, rows, piece.shape[-1])


def _places(piece: Piece, values_KRN: torch.Tensor) -> tuple[int, slice, slice]:
    """Return the first matrix, and which of the parameter's row and column means are theirs."""
    number, rows, columns = values_KRN.shape
    first = piece.start // (piece.shape[-2] * piece.shape[-1])
    row = (piece.start - piece.start % _unit(piece)) // columns
    return (
        first,
        slice(row, row + number * rows),
        slice(first * columns, (first + number) * columns),
    )


def _add_squares(
    piece: Piece, gradients: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> None:
    """Add this rank's share to the means of squares by row and column."""
    squares = _matrices(piece, gradients).square().add_(_LEAST)
    _, row, column = _places(piece, squares)
    *_, num_rows, num_columns = piece.shape
    rows[row] += squares.sum(2, dtype=torch.float64).view(-1) / num_columns
    columns[column] += squares.sum(1, dtype=torch.float64).view(-1) / num_rows


def _update(
    piece: Piece, gradients: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> tuple[int, torch.Tensor]:
    """Return the first matrix that the piece lies in, and its update before clipping, (K, R, N)."""
    update = _matrices(piece, gradients)
    number, num_rows, num_columns = update.shape
    first, row, column = _places(piece, update)
    by_matrix = rows.view(-1, piece.shape[-2])
    scaled = (by_matrix / by_matrix.mean(1, keepdim=True)).rsqrt().view(-1)[row]
    update = update * scaled.view(number, num_rows, 1)
    return first, update * columns[column].rsqrt().view(number, 1, num_columns)
