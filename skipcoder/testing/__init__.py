"""What every extension must do, as test classes to inherit (pytest): codecs, sources, activations, formats, places.

    class TestMine(CodecTests):
        codec = Mine

The tests of the built-in ones inherit them, too (tests/).
"""

from skipcoder.testing.activation import ActivationTests
from skipcoder.testing.codec import CodecTests
from skipcoder.testing.format import FormatTests
from skipcoder.testing.place import PlaceTests
from skipcoder.testing.source import SourceTests

__all__ = ["ActivationTests", "CodecTests", "FormatTests", "PlaceTests", "SourceTests"]
