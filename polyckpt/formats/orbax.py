from polyckpt.formats.table import Format

DIRECTORY = Format(name="orbax-DIRECTORY", title="orbax", adapter="", recognises=lambda path: False, reader="")
