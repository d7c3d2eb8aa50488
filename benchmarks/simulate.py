"""How scoring grows with workers, simulated from costs that were measured: `make bench ONLY=workers` has them.

    python benchmarks/simulate.py [--rows 100000000] [--row-seconds S] [--part-seconds S] [--dispatch-seconds S] ...

Assumed: workers are alike, each takes the next part when it has ended one; the driver hands parts out one by one;
reading and writing take what they took here, whoever else reads and writes; a worker's speed varies by a tenth, that of
a part by a twentieth; a lost worker's part is begun again by another, and the worker comes back after its start. Not in
it: storage or a network that is full, and machines that are slow for long.
"""

import argparse
import heapq
import random

PART_ROWS = 4096


def simulate(workers, rows, costs, seed=2021):
    """Seconds until the last row, what that is of the seconds if no worker ever waited, and the share scored again."""
    chance = random.Random(seed)
    parts = -(-rows // PART_ROWS)
    speed = [max(0.5, chance.gauss(1, 0.1)) for _ in range(workers)]
    free = [(costs.start_seconds * max(0.5, chance.gauss(1, 0.1)), worker) for worker in range(workers)]
    heapq.heapify(free)
    driver = end = 0.0
    again = 0
    while parts:
        now, worker = heapq.heappop(free)
        driver = max(now, driver) + costs.dispatch_seconds
        work = (costs.part_seconds + PART_ROWS * costs.row_seconds) * max(0.5, chance.gauss(1, 0.05)) / speed[worker]
        lost = chance.expovariate(1 / (3600 * costs.hours_to_failure))
        if lost < work:
            again += 1
            heapq.heappush(free, (driver + lost + costs.start_seconds, worker))
            continue
        parts -= 1
        end = max(end, driver + work)
        heapq.heappush(free, (driver + work, worker))
    alone = rows * costs.row_seconds + rows / PART_ROWS * costs.part_seconds
    seconds = costs.list_seconds + end
    return seconds, alone / sum(speed) / seconds, again * PART_ROWS / rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--row-seconds", type=float, required=True, help="to score a row, by one worker")
    parser.add_argument("--part-seconds", type=float, required=True, help="to read and write a part")
    parser.add_argument("--dispatch-seconds", type=float, required=True, help="of the driver, for each part")
    parser.add_argument("--start-seconds", type=float, required=True, help="until a worker has its classifier")
    parser.add_argument("--list-seconds", type=float, default=60, help="to look at the tables")
    parser.add_argument("--hours-to-failure", type=float, default=1000, help="of one worker, on average")
    costs = parser.parse_args()
    print("| workers | hours | of the ideal | scored again |")
    print("| --- | --- | --- | --- |")
    for workers in (1, 10, 100, 300, 1000):
        seconds, share, again = simulate(workers, costs.rows, costs)
        print(f"| {workers:,} | {seconds / 3600:,.2f} | {share:.1%} | {again:.3%} |")


if __name__ == "__main__":
    main()
