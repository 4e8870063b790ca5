"""Reading of Zstandard files that notices when one breaks off."""

import io
from typing import Any

BLOCK = 2**18


class ZstdFile(io.RawIOBase):
    """The decompressed bytes of all frames of a stream.

    The usual stream reader takes a file that breaks off inside a frame for one that ends.

    Raises (on reading):
      EOFError: the file breaks off.
      OSError: it is no Zstandard file, or damaged.
    """

    def __init__(self, raw: Any):
        import zstandard

        self._zstd, self._raw = zstandard, raw
        self._decoder: Any = None
        self._pending = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            block = self._pending or self._raw.read(BLOCK)
            self._pending = b""
            if not block:
                if self._decoder is not None:
                    raise EOFError("the compressed file breaks off")
                return 0
            if self._decoder is None:
                self._decoder = self._zstd.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._decoder.decompress(block)
            except self._zstd.ZstdError as error:
                raise OSError(f"damaged Zstandard data: {error}") from None
            if self._decoder.eof:
                self._pending = self._decoder.unused_data
                self._decoder = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
