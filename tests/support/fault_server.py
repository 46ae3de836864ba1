"""An OpenAI-compatible server that fails on request, in the ways that real servers fail: ``python fault_server.py PORT_FILE``.

The text depends only on the prompt, and on the request's seed if the temperature is not 0. A prompt that names a fault fails that way on
its first tries: ``fault=cut*2`` is cut off twice, then answered. ``GET /stats`` returns how often each prompt was answered and how often it
failed, the largest number of requests in flight, and the API keys received.
"""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import json
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

answered: Counter[str] = Counter()
keys: Counter[str] = Counter()
failed: Counter[str] = Counter()
early: Counter[str] = Counter()
not_before: dict[str, float] = {}
in_flight = most = 0


WORDS = [f"{a}{b}" for a in ("mil", "tor", "ban", "sel", "quin", "dra") for b in ("ka", "no", "rest", "dy", "lum", "vex")]


def written(body: dict, prompt: str) -> str:
    """Return an echo of the prompt, or two scores for a referee's prompt, or a new instruction for a generator's."""
    if "Rate how" in prompt:
        first, second = hashlib.sha256(prompt.encode()).digest()[:2]
        return f"{1 + first % 10} {1 + second % 10}"
    if "Write one new" in prompt:
        return " ".join(random.Random(body["seed"]).sample(WORDS, 6))
    return f"draw {body['seed']} of {prompt}" if body.get("temperature") else f"echo {prompt}"


def reply(body: dict, prompt: str) -> bytes:
    chat = "messages" in body
    text = written(body, prompt)
    tokens = [*text[:3]]
    choice: dict = {"index": 0, "finish_reason": "stop"}
    if chat:
        choice["message"] = {"role": "assistant", "content": text}
        if k := body.get("top_logprobs"):
            table = [{"token": t, "logprob": -0.5, "top_logprobs": [{"token": t, "logprob": -0.5 - i} for i in range(k)]} for t in tokens]
            choice["logprobs"] = {"content": table}
    elif k := body.get("prompt_logprobs"):
        ids = body["prompt"]
        # Like vLLM: no entry for the first token, and the token itself is listed even if it is not among the k most likely.
        likeliest = [{str(j): {"logprob": -2.0 - j, "rank": j + 2} for j in range(k) if j != i} for i in ids]
        entries = [{str(i): {"logprob": -1.0, "rank": 1}} | others for i, others in zip(ids, likeliest, strict=True)]
        choice |= {"text": "", "prompt_logprobs": [None, *entries[1:]]}
    else:
        choice["text"] = text
    usage = {"prompt_tokens": len(prompt), "completion_tokens": 3, "total_tokens": len(prompt) + 3}
    return json.dumps({"id": "x", "object": "chat.completion" if chat else "text_completion", "created": 0, "model": body["model"],
                       "choices": [choice], "usage": usage}).encode()  # fmt: skip


async def send(writer: asyncio.StreamWriter, status: str, body: bytes, headers: str = "", drip: float = 0.0) -> None:
    writer.write(f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode())
    if drip:
        for byte in body:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(drip)
    else:
        writer.write(body)
    await writer.drain()


async def answer(writer: asyncio.StreamWriter, body: dict, authorization: str) -> bool:
    """Answer one request. Return False if the connection must be closed."""
    prompt = body["messages"][-1]["content"] if "messages" in body else str(body["prompt"])
    if time.time() < not_before.get(prompt, 0):
        early[prompt] += 1
    fault = re.search(r"fault=(\w+)(?:\*(\d+))?", prompt)
    whole = reply(body, prompt)
    await asyncio.sleep(float(delay[1]) if (delay := re.search(r"delay=([\d.]+)", prompt)) else 0.002)
    if fault is None or failed[prompt] >= int(fault[2] or 1):
        await send(writer, "200 OK", whole)
        answered[prompt] += 1
        return True
    failed[prompt] += 1
    kind = fault[1]
    error = json.dumps({"error": {"message": f"no, {authorization}", "type": "x"}}).encode()  # a careless server repeats the key
    if kind == "full":
        not_before[prompt] = time.time() + 0.3
        await send(writer, "429 Too Many Requests", error, "Retry-After: 0.3\r\n")
    elif kind == "fullms":
        await send(writer, "429 Too Many Requests", error, "retry-after-ms: 100\r\n")
    elif kind == "busy":
        await send(writer, "503 Service Unavailable", error, f"Retry-After: {email.utils.formatdate(time.time() + 1, usegmt=True)}\r\n")
    elif kind == "error":
        await send(writer, "500 Internal Server Error", error)
    elif kind == "html":
        await send(writer, "502 Bad Gateway", b"<html>" + authorization.encode() + b"</html>")
    elif kind == "malformed":
        await send(writer, "200 OK", whole[:-20])
    elif kind == "empty":
        await send(writer, "200 OK", b'{"choices": []}')
    elif kind == "null":
        await send(writer, "200 OK", b"null")
    elif kind == "drip":
        await send(writer, "200 OK", whole, drip=0.1)
    elif kind == "silent":
        await asyncio.sleep(30)
    elif kind == "refused":
        await send(writer, "400 Bad Request", error)
    elif kind == "key":
        await send(writer, "401 Unauthorized", error)
    elif kind == "cut":
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n\r\n" + whole[:30])
        await writer.drain()
        return False
    elif kind == "hangup":
        return False
    return True


async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    global in_flight, most
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
            content = await reader.readexactly(int(length[1]) if length else 0)
            if head.startswith("GET"):
                stats = {"answered": answered, "failed": failed, "early": early, "most": most, "keys": keys}
                await send(writer, "200 OK", json.dumps(stats).encode())
                continue
            authorization = re.search(r"authorization: (.*)\r", head, re.IGNORECASE)
            keys[authorization[1] if authorization else ""] += 1
            in_flight += 1
            most = max(most, in_flight)
            try:
                if not await answer(writer, json.loads(content), authorization[1] if authorization else ""):
                    return
            finally:
                in_flight -= 1
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def main(port_file: Path) -> None:
    server = await asyncio.start_server(connection, "127.0.0.1", 0, limit=1 << 22, backlog=512)
    temporary = port_file.with_suffix(".tmp")
    temporary.write_text(str(server.sockets[0].getsockname()[1]))
    temporary.replace(port_file)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
