from polyckpt.formats.table import Format

CHECKPOINT = Format(
    name="tensorflow_files-CHECKPOINT", title="tensorflow_files", adapter="", recognises=lambda path: False, reader=""
)
