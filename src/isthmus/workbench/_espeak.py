"""A program of its own: speaks lines with libespeak-ng; run by :mod:`isthmus.workbench.speech`.

It reads JSON lines ``[text, voice, speed, pitch]`` from its input. It writes one JSON list of
``[samples, [[phoneme, start in ms], ...]]`` in one line, then all samples as 16-bit numbers. The
library is GPL-3 and gives equal output for equal calls only in a fresh process, so it lives here,
apart; this file imports nothing of isthmus.
"""

import ctypes
import importlib
import json
import sys
from typing import Any

RETRIEVE, PHONEME_EVENTS_IN_IPA, UTF8 = 2, 3, 1
SPEED, PITCH = 1, 3
END, PHONEME = 0, 7


class Event(ctypes.Structure):
    """What the library tells with a piece of sound: ``espeak_EVENT``."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("string", ctypes.c_char * 8),
    )


CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event)
)


def main() -> None:
    """Speak everything."""
    loader: Any = importlib.import_module("espeakng_loader")
    library = ctypes.CDLL(loader.get_library_path())
    rate = library.espeak_Initialize(
        RETRIEVE, 0, loader.get_data_path().encode(), PHONEME_EVENTS_IN_IPA
    )
    if rate < 1:
        sys.exit("espeak-ng finds no data")
    sound = bytearray()
    phonemes: list[tuple[str, int]] = []

    def take(samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            sound.extend(ctypes.string_at(samples, 2 * count))
        index = 0
        while events[index].type != END:
            if events[index].type == PHONEME:
                name = events[index].string.decode("utf-8", "ignore")
                if name.strip("_: "):
                    phonemes.append((name, events[index].audio_position))
            index += 1
        return 0

    callback = CALLBACK(take)
    library.espeak_SetSynthCallback(callback)
    told, everything = [], bytearray()
    for row in sys.stdin:
        text, voice, speed, pitch = json.loads(row)
        sound.clear()
        phonemes.clear()
        if library.espeak_SetVoiceByName(voice.encode()) != 0:
            sys.exit(f"espeak-ng has no voice {voice!r}")
        library.espeak_SetParameter(SPEED, speed, 0)
        library.espeak_SetParameter(PITCH, pitch, 0)
        data = text.encode() + b"\0"
        library.espeak_Synth(data, len(data), 0, 1, 0, UTF8, None, None)
        library.espeak_Synchronize()
        told.append([len(sound) // 2, list(phonemes)])
        everything += sound
    header = json.dumps({"rate": rate, "lines": told}).encode()
    sys.stdout.buffer.write(header + b"\n" + everything)


if __name__ == "__main__":
    main()
