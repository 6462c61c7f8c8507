"""BasicSR's face: registered architectures. Importing this package registers them."""

from .abpn_arch import ABPN
from .carn_arch import CARN, CARNM
from .idn_arch import IDN
from .imdn_arch import IMDN
from .pruned_arch import PrunedNetwork
from .quantized_arch import QuantizedNetwork
from .rdn_arch import RDN
from .rfdn_arch import RFDN
from .spandrel_arch import Spandrel
from .srresnet_bn_arch import SRResNetBN
from .xlsr_arch import XLSR

__all__ = [
    'ABPN',
    'CARN',
    'CARNM',
    'IDN',
    'IMDN',
    'RDN',
    'RFDN',
    'XLSR',
    'PrunedNetwork',
    'QuantizedNetwork',
    'SRResNetBN',
    'Spandrel',
]
