from .backend import LocalBackend as LocalBackend
from .backend import ServerBackend as ServerBackend
from .page import build_page as build_page
from .page import serve as serve
