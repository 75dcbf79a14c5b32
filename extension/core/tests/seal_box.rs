//! Sealed values open with their master key for their context, and in no other way.

use proptest::prelude::*;
use tollgate_core::seal_box::{
    Context, FileFault, MAX_FILE, MAX_KEYS, MasterKey, Refusal, id_text, open, parse_file, sealed_by,
};

const CONTEXT: Context<'_> = Context { kid: "kid-1", algorithm: "ES256", purpose: "access_token" };

fn key() -> MasterKey {
    MasterKey::generate().unwrap()
}

#[test]
fn a_value_opens_with_any_of_several_keys_that_sealed_it() {
    let keys = [key(), key(), key()];
    for sealing in &keys {
        let sealed = sealing.seal(b"private", &CONTEXT).unwrap();
        assert_eq!(sealed_by(&sealed), Some(sealing.id()));
        assert_eq!(**open(&keys, &sealed, &CONTEXT).unwrap(), *b"private");
    }
}

#[test]
fn a_value_does_not_open_with_other_keys() {
    let sealing = key();
    let sealed = sealing.seal(b"private", &CONTEXT).unwrap();
    assert_eq!(open(&[key(), key()], &sealed, &CONTEXT).err(), Some(Refusal::UnknownKey(sealing.id())));
    assert_eq!(open(&[], &sealed, &CONTEXT).err(), Some(Refusal::UnknownKey(sealing.id())));
    // Its id in the place of another's does not help.
    let other = key();
    let mut claimed = sealed.clone();
    claimed[1..9].copy_from_slice(&other.id());
    assert_eq!(open(&[other], &claimed, &CONTEXT).err(), Some(Refusal::Damaged));
}

#[test]
fn a_value_opens_for_no_other_kid_algorithm_or_purpose() {
    let key = key();
    let sealed = key.seal(b"private", &CONTEXT).unwrap();
    let keys = [key];
    for context in [
        Context { kid: "kid-2", ..CONTEXT },
        Context { algorithm: "EdDSA", ..CONTEXT },
        Context { purpose: "refresh_token", ..CONTEXT },
        // The same bytes, divided in another way.
        Context { kid: "kid-1ES", algorithm: "256", ..CONTEXT },
        Context { algorithm: "ES256access", purpose: "_token", ..CONTEXT },
    ] {
        assert_eq!(open(&keys, &sealed, &context).err(), Some(Refusal::Damaged), "{context:?}");
    }
}

#[test]
fn two_seals_of_a_value_differ() {
    let key = key();
    let seal = || key.seal(b"private", &CONTEXT).unwrap();
    assert_ne!(seal(), seal());
}

#[test]
fn a_file_holds_the_keys_that_were_written_to_it() {
    let (one, two) = (key(), key());
    let text = format!("# made today\n\n  {}\r\n{}", *one.to_line(), *two.to_line());
    let keys = parse_file(text.as_bytes()).unwrap();
    assert_eq!(keys.iter().map(MasterKey::id).collect::<Vec<_>>(), [one.id(), two.id()]);
    assert_eq!(keys[0].as_bytes(), one.as_bytes());
}

#[test]
fn a_file_with_anything_else_is_refused_and_not_repeated() {
    let line = key().to_line().to_string();
    let digits = line.split_once(':').unwrap().1;
    let cases: [(String, FileFault); 9] = [
        (String::new(), FileFault::Empty),
        ("# nothing\n".into(), FileFault::Empty),
        (format!("{line}\n{digits}"), FileFault::NotAKey(2)),
        (line[..line.len() - 1].into(), FileFault::NotAKey(1)),
        (format!("{line}0"), FileFault::NotAKey(1)),
        (format!("{}g", &line[..line.len() - 1]), FileFault::NotAKey(1)),
        (format!("\ntollgate-master-key-1:{}", "0".repeat(64)), FileFault::Placeholder(2)),
        (format!("{line}\n{line}"), FileFault::Repeated(2)),
        ("#".repeat(MAX_FILE + 1), FileFault::TooLarge),
    ];
    for (text, fault) in cases {
        assert_eq!(parse_file(text.as_bytes()).err(), Some(fault));
        assert!(!fault.to_string().contains(&digits[..8]));
    }
    let many: String = (0..=MAX_KEYS).map(|_| format!("{}\n", *key().to_line())).collect();
    assert_eq!(parse_file(many.as_bytes()).err(), Some(FileFault::TooMany));
}

#[test]
fn debug_output_names_a_key_by_its_id_only() {
    let key = key();
    assert_eq!(format!("{key:?}"), format!("MasterKey({})", id_text(&key.id())));
}

proptest! {
    #[test]
    fn a_changed_value_does_not_open(text in proptest::collection::vec(any::<u8>(), 0..200), at: prop::sample::Index, bit in 0..8u8) {
        let key = key();
        let mut sealed = key.seal(&text, &CONTEXT).unwrap();
        let keys = [key];
        prop_assert_eq!(&**open(&keys, &sealed, &CONTEXT).unwrap(), &text[..]);
        let at = at.index(sealed.len());
        sealed[at] ^= 1 << bit;
        prop_assert!(open(&keys, &sealed, &CONTEXT).is_err());
    }

    #[test]
    fn anything_may_be_opened_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
        let _ = open(&[key()], &bytes, &CONTEXT);
        let _ = parse_file(&bytes);
    }
}
