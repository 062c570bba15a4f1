"""Sudoku by trying everything: shares nothing with what it judges."""

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}


def peers(size, cell):
    """The cells that may not hold the same digit as `cell`."""
    high, wide = BOXES[size]
    row, column = divmod(cell, size)
    for other in range(size * size):
        r, c = divmod(other, size)
        same_box = r // high == row // high and c // wide == column // wide
        if other != cell and (r == row or c == column or same_box):
            yield other


def solutions(cells, limit=2):
    """Up to `limit` solutions of a list of digits, by trying everything."""
    size = round(len(cells) ** 0.5)
    beside = [list(peers(size, cell)) for cell in range(len(cells))]
    found = []

    def search(cells):
        options = {
            at: {*range(1, size + 1)} - {cells[p] for p in beside[at]}
            for at, digit in enumerate(cells)
            if digit == 0
        }
        if not options:
            found.append(cells)
            return
        at = min(options, key=lambda cell: len(options[cell]))
        for digit in options[at]:
            if len(found) < limit:
                search([*cells[:at], digit, *cells[at + 1 :]])

    search(list(cells))
    return found


def is_solved(cells):
    size = round(len(cells) ** 0.5)
    clash = any(cells[p] == d for at, d in enumerate(cells) for p in peers(size, at))
    return {*cells} == {*range(1, size + 1)} and not clash


def digits(text):
    return [int(character) for character in text if character != "\n"]
