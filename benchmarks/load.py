"""Load on a server at POST /predict: so many clients at once, or so many requests a second, until the time is up.

python load.py URL TEXTS.csv --clients 64 --seconds 10
python load.py URL TEXTS.csv --rate 500 --batch 16 --seconds 10

Prints JSON: answers of each status, texts a second, and latencies in seconds (of accepted and of refused requests).
Plain sockets, so that little of what is measured is this client; only the standard library.
"""

import argparse
import asyncio
import csv
import itertools
import json
import statistics
import time
from urllib.parse import urlsplit


def requests_of(texts, host, batch):
    """Endless requests as bytes."""
    for start in itertools.count(0, batch):
        some = [texts[(start + i) % len(texts)] for i in range(batch)]
        body = json.dumps({"inputs": some[0] if batch == 1 else [[text] for text in some]}).encode()
        head = (
            f"POST /predict HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        yield head.encode() + b"\r\n\r\n" + body


async def exchange(connection, request):
    """Send a request and read its answer: the status, and whether the connection is kept."""
    reader, writer = connection
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    size = next(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length"))
    await reader.readexactly(size)
    return int(lines[0].split()[1]), b"connection: close" not in head.lower()


async def closed_loop(place, requests, clients, seconds, record):
    """So many clients, each of which asks again when it has its answer."""
    end = time.perf_counter() + seconds

    async def client():
        connection = await asyncio.open_connection(*place)
        while (begun := time.perf_counter()) < end:
            status, kept = await exchange(connection, next(requests))
            record(status, time.perf_counter() - begun)
            if not kept:
                connection = await asyncio.open_connection(*place)

    await asyncio.gather(*(client() for _ in range(clients)))


async def open_loop(place, requests, rate, seconds, record):
    """So many requests a second, whether the earlier ones are answered or not."""
    free, tasks, begun = [], set(), time.perf_counter()

    async def ask(request, due):
        try:
            connection = free.pop() if free else await asyncio.open_connection(*place)
            status, kept = await exchange(connection, request)
        except (OSError, asyncio.IncompleteReadError):
            status, kept = 0, False
        record(status, time.perf_counter() - due)
        if kept:
            free.append(connection)

    for number in range(int(rate * seconds)):
        due = begun + number / rate
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(ask(next(requests), time.perf_counter()))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.wait_for(asyncio.gather(*tasks), 60)


def percentile(values, share):
    return statistics.quantiles(values, n=1000)[round(share * 1000) - 1] if len(values) > 1 else float("nan")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("texts")
    parser.add_argument("--clients", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10)
    arguments = parser.parse_args()
    with open(arguments.texts, encoding="utf-8", newline="") as file:
        texts = [row["sentence"] for row in csv.DictReader(file)]
    place = urlsplit(arguments.url)
    found = {}

    def record(status, seconds):
        found.setdefault(status, []).append(seconds)

    requests = requests_of(texts, place.netloc, arguments.batch)
    where = (place.hostname, place.port)
    begun = time.perf_counter()
    if arguments.clients:
        asyncio.run(closed_loop(where, requests, arguments.clients, arguments.seconds, record))
    else:
        asyncio.run(open_loop(where, requests, arguments.rate, arguments.seconds, record))
    seconds = time.perf_counter() - begun
    good, refused = found.get(200, []), found.get(429, [])
    told = {f"status_{status}": len(latencies) for status, latencies in found.items()}
    told |= {"texts_a_second": len(good) * arguments.batch / seconds}
    for name, latencies in (("answered", good), ("refused", refused)):
        if latencies:
            told |= {f"{name}_p50": percentile(latencies, 0.5), f"{name}_p99": percentile(latencies, 0.99)}
            told |= {f"{name}_max": max(latencies)}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
