//! Which texts a jsonb value contains and how long it is as text, read from its stored bytes (PostgreSQL's
//! `utils/jsonb.h` and `numeric.c`). Nothing is printed for it: a number of six bytes may have 131072 digits.

/// The maximum size of a value. Scalars have depth 0, `{}` and `[]` have 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    pub bytes: usize,
    pub depth: usize,
}

/// Why a value is not within the bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Excess {
    Bytes,
    Depth,
    /// It does not have PostgreSQL's format.
    Malformed,
}

/// Whether a value with this many stored bytes must be too long as text, whatever it is. The largest stored form of a
/// short text is that of `0, `: an entry of 4 bytes and a number of 8; plus a few bytes at the beginning.
pub fn cannot_be_within(stored: usize, bounds: Bounds) -> bool {
    stored.saturating_sub(64) / 5 > bounds.bytes
}

// The header of a container: the number of elements or pairs, and its kind.
const COUNT: u32 = 0x0fff_ffff;
const IS_SCALAR: u32 = 0x1000_0000;
const IS_OBJECT: u32 = 0x2000_0000;
// The entry of an element: its length, or where it ends.
const LENGTH: u32 = 0x0fff_ffff;
const IS_END: u32 = 0x8000_0000;
const KIND: u32 = 0x7000_0000;
const STRING: u32 = 0x0000_0000;
const NUMERIC: u32 = 0x1000_0000;
const FALSE: u32 = 0x2000_0000;
const TRUE: u32 = 0x3000_0000;
const NULL: u32 = 0x4000_0000;
const CONTAINER: u32 = 0x5000_0000;
const WORD: usize = 4;

/// The number of bytes of a value as `jsonb_out` prints it, given its content (the bytes after the length word). Stops
/// at the bounds, so that it costs no more than they allow. Calls `each_text` for each text, including keys.
pub fn text_size(content: &[u8], bounds: Bounds, each_text: impl FnMut(&[u8])) -> Result<usize, Excess> {
    let mut size = Size { bytes: 0, bounds, each_text };
    size.add_container(content, 0)?;
    Ok(size.bytes)
}

struct Size<F> {
    bytes: usize,
    bounds: Bounds,
    each_text: F,
}

impl<F: FnMut(&[u8])> Size<F> {
    fn add(&mut self, bytes: usize) -> Result<(), Excess> {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes > self.bounds.bytes { Err(Excess::Bytes) } else { Ok(()) }
    }

    fn add_container(&mut self, content: &[u8], depth: usize) -> Result<(), Excess> {
        let header = word(content, 0)?;
        let count = (header & COUNT) as usize;
        let entries = if header & IS_OBJECT != 0 { 2 * count } else { count };
        if header & IS_SCALAR == 0 {
            if depth >= self.bounds.depth {
                return Err(Excess::Depth);
            }
            let colons = entries - count;
            self.add(2 + 2 * colons + 2 * count.saturating_sub(1))?;
        }
        let data = content.get(WORD + WORD * entries..).ok_or(Excess::Malformed)?;
        let mut start = 0;
        for n in 0..entries {
            let entry = word(content, WORD + WORD * n)?;
            let length = (entry & LENGTH) as usize;
            let end = if entry & IS_END != 0 { length } else { start + length };
            let element = data.get(start..end).ok_or(Excess::Malformed)?;
            // Numbers and containers are aligned, and the padding counts towards their length.
            let aligned = || element.get(start.next_multiple_of(WORD) - start..).ok_or(Excess::Malformed);
            match entry & KIND {
                STRING => {
                    self.add(string_size(element))?;
                    (self.each_text)(element);
                }
                NUMERIC => self.add(numeric_size(aligned()?)?)?,
                FALSE => self.add("false".len())?,
                TRUE | NULL => self.add("true".len())?,
                CONTAINER => self.add_container(aligned()?, depth + 1)?,
                _ => return Err(Excess::Malformed),
            }
            start = end;
        }
        Ok(())
    }
}

fn word(bytes: &[u8], at: usize) -> Result<u32, Excess> {
    let word = bytes.get(at..).and_then(|rest| rest.first_chunk()).ok_or(Excess::Malformed)?;
    Ok(u32::from_ne_bytes(*word))
}

fn half_word(bytes: &[u8], at: usize) -> Result<u16, Excess> {
    let half = bytes.get(at..).and_then(|rest| rest.first_chunk()).ok_or(Excess::Malformed)?;
    Ok(u16::from_ne_bytes(*half))
}

/// In quotes, as `escape_json` writes it.
fn string_size(text: &[u8]) -> usize {
    let escaped = |byte: &u8| match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 0x08 | 0x0c => 2,
        ..0x20 => 6,
        _ => 1,
    };
    2 + text.iter().map(escaped).sum::<usize>()
}

/// A numeric in base 10000, after its length word.
fn numeric_size(value: &[u8]) -> Result<usize, Excess> {
    const FORM: u16 = 0xc000;
    const SHORT: u16 = 0x8000;
    const NOT_A_NUMBER: u16 = 0xc000;
    const NEGATIVE: u16 = 0x4000;
    let content = value.get(WORD..).ok_or(Excess::Malformed)?;
    let header = half_word(content, 0)?;
    let (is_negative, decimals, weight, digits) = match header & FORM {
        NOT_A_NUMBER => return Err(Excess::Malformed),
        SHORT => {
            let magnitude = i32::from(header & 0x3f);
            let weight = if header & 0x40 != 0 { magnitude - 0x40 } else { magnitude };
            (header & 0x2000 != 0, (header & 0x1f80) >> 7, weight, &content[2..])
        }
        sign => {
            let weight = i32::from(half_word(content, 2)?.cast_signed());
            (sign == NEGATIVE, header & 0x3fff, weight, content.get(4..).ok_or(Excess::Malformed)?)
        }
    };
    // The number of digits before the point: those of the first group, and four for each further one.
    let whole = match usize::try_from(weight) {
        Ok(weight) if digits.len() >= 2 => {
            let first = half_word(digits, 0)?.max(1).ilog10() as usize + 1;
            first + 4 * weight
        }
        _ => 1,
    };
    let fraction = if decimals > 0 { 1 + usize::from(decimals) } else { 0 };
    Ok(usize::from(is_negative) + whole + fraction)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDE: Bounds = Bounds { bytes: 1000, depth: 10 };

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    /// Arrays nested to this depth, the innermost empty.
    fn nested(depth: u32) -> Vec<u8> {
        const IS_ARRAY: u32 = 0x4000_0000;
        (1..depth).fold(words(&[IS_ARRAY]), |inner, _| {
            let mut outer = words(&[IS_ARRAY | 1, CONTAINER | u32::try_from(inner.len()).unwrap()]);
            outer.extend(inner);
            outer
        })
    }

    #[test]
    fn a_value_is_measured_and_not_beyond_its_bounds() {
        let text_size = |value: &[u8], bounds| text_size(value, bounds, |_| ());
        assert_eq!(text_size(&nested(3), WIDE), Ok("[[[]]]".len()));
        assert_eq!(text_size(&nested(3), Bounds { bytes: 6, depth: 3 }), Ok(6));
        assert_eq!(text_size(&nested(3), Bounds { bytes: 6, depth: 2 }), Err(Excess::Depth));
        assert_eq!(text_size(&nested(3), Bounds { bytes: 5, depth: 3 }), Err(Excess::Bytes));
    }

    #[test]
    fn the_escapes_of_a_text_count() {
        assert_eq!(string_size("é\"\n\u{1}".as_bytes()), r#""é\"\n\u0001""#.len());
    }

    #[test]
    fn what_is_cut_off_or_of_no_known_kind_is_malformed_wherever_it_ends() {
        let whole = nested(4);
        for end in 0..whole.len() {
            assert_eq!(text_size(&whole[..end], WIDE, |_| ()), Err(Excess::Malformed), "{end}");
        }
        for bad in
            [words(&[0x4000_0001, 0x7000_0000]), words(&[0x4000_0001, NUMERIC]), words(&[COUNT | IS_OBJECT])]
        {
            assert!(text_size(&bad, WIDE, |_| ()).is_err(), "{bad:?}");
        }
    }
}
