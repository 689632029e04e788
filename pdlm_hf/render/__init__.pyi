from .drawing import contact_sheet as contact_sheet
from .drawing import draw_captions as draw_captions
from .drawing import draw_regions as draw_regions
from .drawing import save_drawing as save_drawing
from .recording import save_recording as save_recording
from .report import image_html as image_html
from .report import write_report as write_report
from .text import pluralize as pluralize
