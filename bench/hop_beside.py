"""What `bench/hop.py` measures beside the API: an engine that computes nothing, a bare relay."""

import asyncio
import json
import sys

import uvloop

CHUNK = {
    "id": "chatcmpl-0123456789abcdef",
    "object": "chat.completion.chunk",
    "created": 1700000000,
    "model": "engine",
    "choices": [{"index": 0, "delta": {"content": " seven"}, "finish_reason": None}],
}
MODELS = {"object": "list", "data": [{"id": "engine", "object": "model", "root": "/nowhere"}]}
WHOLE = {"id": "chatcmpl-1", "object": "chat.completion", "choices": [], "model": "engine"}


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection of the engine: as many requests as come."""
    while True:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return writer.close()
        asked = {}
        if b"content-length:" in head.lower():
            length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            asked = json.loads(await reader.readexactly(length))
        if asked.get("stream"):
            await stream(writer, asked["count"], asked["pause"])
        else:
            whole(writer, WHOLE if asked else MODELS)
        await writer.drain()


def whole(writer: asyncio.StreamWriter, told: object) -> None:
    body = json.dumps(told).encode()
    head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: "
    writer.write(f"{head}{len(body)}\r\n\r\n".encode() + body)


async def stream(writer: asyncio.StreamWriter, count: int, pause: float) -> None:
    head = (
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    event = b"data: " + json.dumps(CHUNK).encode() + b"\n\n"
    part = b"%x\r\n%b\r\n" % (len(event), event)
    writer.write(head.encode())
    for _ in range(count):
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(pause)
    writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


def relay(port: int):  # type: ignore[no-untyped-def]
    """Bytes to the engine, and bytes back."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(carry(reader, ours), carry(theirs, writer))

    return connected


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


async def main() -> None:
    what, port = sys.argv[1], int(sys.argv[2])
    server = await asyncio.start_server(answer if what == "engine" else relay(port), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
