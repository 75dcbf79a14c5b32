//! jsonb of JSON that is parsed already, formed by the functions that PostgreSQL's own input function uses.
#![allow(unsafe_code)]

use crate::pg::sys;
use core::ffi::{c_char, c_int};
use core::ptr;
use pgrx::pg_sys::{Datum, JsonbIteratorToken, JsonbParseState, JsonbValue, jbvType};
use tollgate_core::json::{Json, Object};

/// `None` unless it is kept as it was written.
pub(crate) fn of_object(members: &Object) -> Option<Datum> {
    if !members.values().all(Json::is_exact) {
        return None;
    }
    // In the order of jsonb (`lengthCompareJsonbPair`), which spares its sort the work.
    let mut members: Vec<(&String, &Json)> = members.iter().collect();
    members.sort_unstable_by_key(|(name, _)| (name.len(), *name));
    // SAFETY: the closure holds nothing that needs dropping.
    Some(unsafe {
        sys::guarded(|| {
            let mut state = ptr::null_mut();
            Datum::from(sys::JsonbValueToJsonb(push_object(&mut state, members.iter().copied())))
        })
    })
}

/// Returns the whole, if this is it.
///
/// # Safety
///
/// Of this and the following: only inside `sys::guarded`. Texts are read until the whole is converted.
unsafe fn push_object<'j>(
    state: &mut *mut JsonbParseState,
    members: impl Iterator<Item = (&'j String, &'j Json)>,
) -> *mut JsonbValue {
    // SAFETY: a state, and tokens in the order of an object's.
    unsafe {
        sys::pushJsonbValue(state, JsonbIteratorToken::WJB_BEGIN_OBJECT, ptr::null_mut());
        for (name, value) in members {
            sys::pushJsonbValue(state, JsonbIteratorToken::WJB_KEY, &mut text(name));
            push(state, JsonbIteratorToken::WJB_VALUE, value);
        }
        sys::pushJsonbValue(state, JsonbIteratorToken::WJB_END_OBJECT, ptr::null_mut())
    }
}

/// As a member or an element. A list or an object says itself where it begins and ends. Nesting is limited where it is
/// parsed (`json::MAX_DEPTH`).
unsafe fn push(state: &mut *mut JsonbParseState, place: JsonbIteratorToken::Type, json: &Json) {
    // SAFETY: as above; the field that is set is that of the type.
    unsafe {
        let mut scalar = JsonbValue::default();
        match json {
            Json::Null => scalar.type_ = jbvType::jbvNull,
            Json::Bool(value) => {
                scalar.type_ = jbvType::jbvBool;
                scalar.val.boolean = *value;
            }
            Json::Number(number) => {
                scalar.type_ = jbvType::jbvNumeric;
                scalar.val.numeric = sys::int64_to_numeric(number.as_i64().unwrap_or_default());
            }
            Json::Text(value) => scalar = text(value),
            Json::List(list) => {
                sys::pushJsonbValue(state, JsonbIteratorToken::WJB_BEGIN_ARRAY, ptr::null_mut());
                for element in list {
                    push(state, JsonbIteratorToken::WJB_ELEM, element);
                }
                sys::pushJsonbValue(state, JsonbIteratorToken::WJB_END_ARRAY, ptr::null_mut());
                return;
            }
            Json::Object(members) => {
                push_object(state, members.iter());
                return;
            }
        }
        sys::pushJsonbValue(state, place, &raw mut scalar);
    }
}

/// Points to the text.
fn text(text: &str) -> JsonbValue {
    let mut value = JsonbValue { type_: jbvType::jbvString, ..JsonbValue::default() };
    value.val.string.len = text.len() as c_int;
    value.val.string.val = text.as_ptr().cast::<c_char>().cast_mut();
    value
}
