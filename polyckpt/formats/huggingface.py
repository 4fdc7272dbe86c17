from polyckpt.formats.table import Format

FOLDER = Format(name="huggingface-FOLDER", title="huggingface", adapter="", recognises=lambda path: False, reader="")
