//! PostgreSQL's values as bytes in place: a value is copied only if it was compressed or stored out of line.
//!
//! Only [`varlena`] is unsafe. What it returns is a slice, and arrays and addresses are read from slices with every
//! bound checked.
#![allow(unsafe_code)]

use crate::pg::sys;
use core::ffi::{CStr, c_int};
use pgrx::pg_sys::{self, Datum};
use tollgate_core::jsonb::{self, Bounds, Excess};
use tollgate_core::net::Net;

/// The content of a varlena value, without its header.
///
/// # Safety
///
/// `datum` points to a valid varlena value that lives for `'a`, in a memory context that lives for `'a` (where a
/// detoasted copy is put).
pub(crate) unsafe fn varlena<'a>(datum: Datum) -> &'a [u8] {
    // SAFETY: as the caller promises. A value that is neither compressed nor out of line is returned as it is.
    unsafe {
        let mut pointer = datum.cast_mut_ptr::<pg_sys::varlena>();
        if pgrx::varlena::varatt_is_4b_c(pointer) || pgrx::varlena::varatt_is_1b_e(pointer) {
            pointer = pg_sys::pg_detoast_datum_packed(pointer);
        }
        pgrx::varlena::varlena_to_byte_slice(pointer)
    }
}

/// The length in the catalogue (`typlen`) of types of variable length.
pub(crate) const VARLENA: i16 = -1;
/// Not a `typlen`: any type that is passed by value.
pub(crate) const BY_VALUE: i16 = 0;

/// Copies a value of a type of that length into the current memory context. A value stored out of line is fetched,
/// since its row may be removed later.
///
/// # Safety
///
/// A value of such a type; only inside `sys::guarded`.
pub(crate) unsafe fn copy(datum: Datum, length: i16) -> Datum {
    // SAFETY: the caller's promise.
    unsafe {
        let pointer = datum.cast_mut_ptr::<pg_sys::varlena>();
        if length == VARLENA && pgrx::varlena::varatt_is_1b_e(pointer) {
            return Datum::from(sys::detoast_external_attr(pointer));
        }
        sys::datumCopy(datum, length == BY_VALUE, i32::from(length))
    }
}

/// A one-dimensional array of a varlena type whose alignment is that of int: text[], cidr[], inet[].
#[derive(Clone, Copy)]
pub(crate) struct TextArray<'a> {
    /// The elements; alignment counts from here, since the length of the header is a multiple of it.
    elements: &'a [u8],
    len: usize,
    nulls: Option<&'a [u8]>,
    dimensions: usize,
}

// Offsets in an array's content: the length word is not part of it, but counts for MAXALIGN.
const LENGTH_WORD: usize = 4;
const MAXALIGN: usize = 8;

impl<'a> TextArray<'a> {
    pub(crate) fn empty() -> Self {
        TextArray { elements: &[], len: 0, nulls: None, dimensions: 0 }
    }

    /// Reads the header of an array's content (see `array.h`).
    pub(crate) fn parse(content: &'a [u8]) -> Self {
        let dimensions = int(content, 0);
        if dimensions == 0 {
            return TextArray::empty();
        }
        let len = (0..dimensions).map(|i| int(content, 12 + 4 * i)).product();
        let data_offset = int(content, 4);
        let bitmap = 12 + 8 * dimensions;
        let (start, nulls) = match data_offset {
            0 => ((LENGTH_WORD + bitmap).next_multiple_of(MAXALIGN), None),
            offset => (offset, Some(&content[bitmap..])),
        };
        TextArray { elements: &content[start - LENGTH_WORD..], len, nulls, dimensions }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn dimensions(&self) -> usize {
        self.dimensions
    }

    pub(crate) fn has_nulls(&self) -> bool {
        self.iter().any(|element| element.is_none())
    }

    /// The elements' contents; `None` is NULL.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Option<&'a [u8]>> + use<'a> {
        let TextArray { elements, len, nulls, .. } = *self;
        let mut at = 0;
        (0..len).map(move |i| {
            if nulls.is_some_and(|bitmap| bitmap[i / 8] & (1 << (i % 8)) == 0) {
                return None;
            }
            at = usize::next_multiple_of(at, 4);
            let (header, size) = varlena_extent(&elements[at..]);
            let content = &elements[at + header..at + size];
            at += size;
            Some(content)
        })
    }

    /// The elements that are not NULL.
    pub(crate) fn present(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        self.iter().flatten()
    }
}

/// A value of type text.
pub(crate) fn text(text: &str) -> Datum {
    // SAFETY: the closure holds nothing that needs dropping.
    unsafe { sys::guarded(|| copied(text)) }
}

/// A one-dimensional value of type text[], or an empty one.
pub(crate) fn text_array<'a>(texts: impl Iterator<Item = &'a str>) -> Datum {
    let texts: Vec<&str> = texts.collect();
    let mut elements = vec![Datum::null(); texts.len()];
    // SAFETY: a text is of variable length and aligned as an int. The closure holds nothing that needs dropping.
    unsafe {
        sys::guarded(|| {
            for (element, text) in elements.iter_mut().zip(&texts) {
                *element = copied(text);
            }
            let (count, align) = (elements.len() as c_int, pg_sys::TYPALIGN_INT.cast_signed());
            let array = sys::construct_array(
                elements.as_mut_ptr(),
                count,
                pg_sys::TEXTOID,
                VARLENA.into(),
                false,
                align,
            );
            Datum::from(array)
        })
    }
}

/// # Safety
///
/// Only inside `sys::guarded`.
unsafe fn copied(text: &str) -> Datum {
    // SAFETY: it reads as many bytes.
    Datum::from(unsafe { sys::cstring_to_text_with_len(text.as_ptr().cast(), text.len() as c_int) })
}

fn int(bytes: &[u8], at: usize) -> usize {
    let word: [u8; 4] = bytes[at..at + 4].try_into().expect("four bytes");
    usize::try_from(i32::from_ne_bytes(word)).expect("array headers hold no negative lengths")
}

/// Lengths of the header and of the whole of a varlena value that is neither compressed nor out of line.
fn varlena_extent(bytes: &[u8]) -> (usize, usize) {
    let first = bytes[0];
    let short = if cfg!(target_endian = "little") { first & 1 == 1 } else { first & 0x80 != 0 };
    if short {
        let size = if cfg!(target_endian = "little") { first >> 1 } else { first & 0x7f };
        return (1, usize::from(size));
    }
    let word = u32::from_ne_bytes(bytes[..4].try_into().expect("four bytes"));
    let size = if cfg!(target_endian = "little") { word >> 2 } else { word & 0x3fff_ffff };
    (4, size as usize)
}

/// The number of bytes of a jsonb value as PostgreSQL prints it; calls a function for each of its texts. A value too
/// large for the bounds is not fetched at all.
pub(crate) fn json_text_size(
    jsonb: Datum,
    bounds: Bounds,
    each_text: impl FnMut(&[u8]),
) -> Result<usize, Excess> {
    // SAFETY: a jsonb value; the detoasted copy lives in the memory context of the call.
    unsafe {
        if jsonb::cannot_be_within(sys::toast_raw_datum_size(jsonb), bounds) {
            return Err(Excess::Bytes);
        }
        jsonb::text_size(varlena(jsonb), bounds, each_text)
    }
}

/// A jsonb value as PostgreSQL prints it.
pub(crate) fn json_text(jsonb: Datum) -> String {
    // SAFETY: the output function of jsonb takes such a value and returns a C string.
    let text = unsafe {
        pgrx::direct_function_call_as_datum(pg_sys::jsonb_out, &[Some(jsonb)])
            .map(|text| CStr::from_ptr(text.cast_mut_ptr()).to_string_lossy().into_owned())
    };
    text.unwrap_or_default()
}

/// A short varlena of type text, made at compile time.
pub(crate) const fn short_text<const N: usize>(text: &str) -> [u8; N] {
    let bytes = text.as_bytes();
    assert!(bytes.len() < N && bytes.len() < 126);
    let mut value = [0; N];
    let size = bytes.len() as u8 + 1;
    value[0] = if cfg!(target_endian = "little") { (size << 1) | 1 } else { size | 0x80 };
    let mut i = 0;
    while i < bytes.len() {
        value[i + 1] = bytes[i];
        i += 1;
    }
    value
}

/// An inet or cidr from its content: family, prefix length, address (see `utils/inet.h`).
pub(crate) fn net(content: &[u8]) -> Option<Net> {
    const PGSQL_AF_INET: u8 = 2;
    const PGSQL_AF_INET6: u8 = 3;
    let (&family, rest) = content.split_first()?;
    let (&bits, address) = rest.split_first()?;
    match family {
        PGSQL_AF_INET => Net::v4(address.first_chunk().copied()?, bits),
        PGSQL_AF_INET6 => Net::v6(address.first_chunk().copied()?, bits),
        _ => None,
    }
}
