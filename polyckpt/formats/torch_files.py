from polyckpt.formats.table import Format

FILE = Format(name="torch_files-FILE", title="torch_files", adapter="", recognises=lambda path: False, reader="")
DISTRIBUTED = Format(name="torch_files-DISTRIBUTED", title="torch_files", adapter="", recognises=lambda path: False, reader="")
