from polyckpt.formats.table import Format

FILE = Format(name="equinox_files-FILE", title="equinox_files", adapter="", recognises=lambda path: False, reader="")
