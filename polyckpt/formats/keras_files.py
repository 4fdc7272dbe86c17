from polyckpt.formats.table import Format

ARCHIVE = Format(name="keras_files-ARCHIVE", title="keras_files", adapter="", recognises=lambda path: False, reader="")
WEIGHTS = Format(name="keras_files-WEIGHTS", title="keras_files", adapter="", recognises=lambda path: False, reader="")
SHARDS = Format(name="keras_files-SHARDS", title="keras_files", adapter="", recognises=lambda path: False, reader="")
