"""The rows about what is large: one huge packed file, a million parts, and what a terabyte costs."""

from bench import costs, driving, huge
from bench.contenders import Plan
from bench.rows import Row

ROWS = (*huge.ROWS, "parts", *costs.ROWS)


def measured_rows(plan: Plan) -> list[Row]:
    measures = {"huge": huge.huge_rows, "parts": driving.parts_rows, "cost": costs.cost_rows}
    return [row for name, rows_of in measures.items() if name in plan.wanted for row in rows_of(plan)]
