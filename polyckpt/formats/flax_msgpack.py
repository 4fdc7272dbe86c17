from polyckpt.formats.table import Format

FILE = Format(name="flax_msgpack-FILE", title="flax_msgpack", adapter="", recognises=lambda path: False, reader="")
