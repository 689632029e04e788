from .results import AttributeValue as AttributeValue
from .results import RegionAttributes as RegionAttributes
from .results import csv_fields as csv_fields
from .results import csv_row as csv_row
from .schema import Attribute as Attribute
from .schema import AttributeSchema as AttributeSchema
from .schema import parse_schema as parse_schema
from .schema import read_schema_file as read_schema_file
