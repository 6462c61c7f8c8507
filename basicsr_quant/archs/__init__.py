"""BasicSR's face: registered architectures. Importing this package registers them."""

from .carn_arch import CARN, CARNM
from .idn_arch import IDN
from .imdn_arch import IMDN
from .quantized_arch import QuantizedNetwork
from .rdn_arch import RDN
from .rfdn_arch import RFDN
from .spandrel_arch import Spandrel
from .srresnet_bn_arch import SRResNetBN

__all__ = ['CARN', 'CARNM', 'IDN', 'IMDN', 'RDN', 'RFDN', 'QuantizedNetwork', 'SRResNetBN', 'Spandrel']
