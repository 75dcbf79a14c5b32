//! Refresh tokens: their form, their MAC, and the decision, compared with a model that remembers every token that it
//! issued.

use std::collections::HashMap;

use proptest::prelude::*;
use tollgate_core::refresh::{
    self, Code, Decision, Grace, Key, LAST, Presented, RefreshToken, Session, Subject, TOKEN_LEN,
};
use tollgate_core::{status, token};

const SECOND: i64 = 1_000_000;
const NOW: i64 = 848_000_000 * SECOND;
const GRACE: Grace = Grace { length: 10 * SECOND, same_address: false };
const ID: [u8; 16] = [7; 16];
const SECRET: [u8; 32] = [9; 32];
const SUBJECT: Subject<'static> = Subject { issuer: "https://a.test", session: &ID, secret: &SECRET };

fn key() -> Key {
    Key::new(&[1; 32])
}

fn parsed(text: &str) -> RefreshToken {
    refresh::parse(text.as_bytes()).unwrap_or_else(|| panic!("{text}"))
}

/// The token with other digits, and the checksum that fits them.
fn resealed(token: &str, change: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut body = token.as_bytes()[4..TOKEN_LEN - 8].to_vec();
    change(&mut body);
    let body = String::from_utf8(body).unwrap();
    format!("tgr_{body}{:08x}", crc32fast::hash(body.as_bytes()))
}

#[test]
fn a_token_has_one_spelling() {
    let token = key().issue(&SUBJECT, 1);
    assert_eq!(token.len(), TOKEN_LEN);
    assert!(token.starts_with(&format!("tgr_{}{:016x}", "07".repeat(16), 1)), "{}", *token);
    let read = parsed(&token);
    assert_eq!((read.session, read.generation), (ID, 1));
    assert!(key().made(&SUBJECT, &read));
    for other in [
        token.to_uppercase(),
        token.replacen("tgr", "tgt", 1),
        token.replacen("tgr_", "tgr-", 1),
        format!("{}0", *token),
        format!("{} ", *token),
        format!(" {}", *token),
        format!("Bearer {}", *token),
        token[..TOKEN_LEN - 1].to_owned(),
        token[1..].to_owned(),
        String::new(),
    ] {
        assert!(refresh::parse(other.as_bytes()).is_none(), "{other}");
    }
    for place in 4..TOKEN_LEN {
        for byte in *b"0g/:`A\xff" {
            let mut changed = token.as_bytes().to_vec();
            if changed[place] != byte {
                changed[place] = byte;
                assert!(refresh::parse(&changed).is_none(), "{place} {byte}");
            }
        }
    }
}

#[test]
fn it_is_recognised_as_a_secret_and_is_no_api_token() {
    let token = key().issue(&SUBJECT, 1);
    assert!(token::contains_secret(format!("see {}.", *token)));
    assert!(!token::redact(&token).contains(&token[4..20]));
    assert!(token::parse(token.as_bytes()).is_none());
    let api_token = token::issue(&token::Prefix::parse("tgr").unwrap(), &[3; 40]);
    assert!(refresh::parse(api_token.token().as_bytes()).is_none());
}

#[test]
fn a_generation_is_positive_and_has_a_next_one() {
    let of = |generation: i64| {
        let token = key().issue(&SUBJECT, 1);
        let digits = format!("{generation:016x}");
        let changed = resealed(&token, |body| body[32..48].copy_from_slice(digits.as_bytes()));
        refresh::parse(changed.as_bytes()).map(|token| token.generation)
    };
    for good in [1, 2, i64::MAX - 1] {
        assert_eq!(of(good), Some(good));
    }
    for bad in [0, -1, i64::MIN, i64::MAX] {
        assert_eq!(of(bad), None, "{bad}");
    }
}

#[test]
fn the_mac_is_for_one_key_issuer_session_secret_and_generation() {
    let token = parsed(&key().issue(&SUBJECT, 5));
    assert!(key().made(&SUBJECT, &token));
    let (other_id, other_secret) = ([8; 16], [8; 32]);
    for (what, subject) in [
        ("issuer", Subject { issuer: "https://b.test", ..SUBJECT }),
        ("no issuer", Subject { issuer: "", ..SUBJECT }),
        ("session", Subject { session: &other_id, ..SUBJECT }),
        ("secret", Subject { secret: &other_secret, ..SUBJECT }),
    ] {
        assert!(!key().made(&subject, &token), "{what}");
    }
    assert!(!Key::new(&[2; 32]).made(&SUBJECT, &token), "another key");
    // What a session, an issuer and a number make together is not made by others with the same bytes.
    let text = key().issue(&SUBJECT, 5);
    let next = resealed(&text, |body| body[47] = b'6');
    assert!(!key().made(&SUBJECT, &parsed(&next)), "the generation was changed");
    for place in 48..112 {
        let forged = resealed(&text, |body| body[place] = if body[place] == b'0' { b'1' } else { b'0' });
        assert!(!key().made(&SUBJECT, &parsed(&forged)), "{place}");
    }
    assert_eq!(*key().issue(&SUBJECT, 6), *key().issue(&SUBJECT, 6), "a successor is always the same");
}

#[test]
fn a_key_is_named_by_what_it_is_and_read_back_from_its_bytes() {
    let (one, other) = (Key::generate().unwrap(), Key::generate().unwrap());
    assert_eq!(one.kid().len(), 43);
    assert_ne!(one.kid(), other.kid());
    let again = Key::from_bytes(one.as_bytes()).unwrap();
    assert_eq!(again.kid(), one.kid());
    assert_eq!(*again.issue(&SUBJECT, 1), *one.issue(&SUBJECT, 1));
    assert!(Key::from_bytes(&[0; 31]).is_none() && Key::from_bytes(&[0; 33]).is_none());
}

/// As RFC 2104 defines it, by another implementation.
#[test]
fn the_mac_is_hmac_sha256() {
    use hmac::{Hmac, KeyInit as _, Mac as _};
    let mut mac = Hmac::<sha2::Sha256>::new_from_slice(&[1; 32]).unwrap();
    mac.update(b"tollgate refresh token 1\0");
    mac.update(&14_u64.to_be_bytes());
    mac.update(b"https://a.test");
    mac.update(&ID);
    mac.update(&5_i64.to_be_bytes());
    mac.update(&SECRET);
    let expected: String = mac.finalize().into_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(key().issue(&SUBJECT, 5)[52..116], expected);
}

#[test]
fn the_codes_are_those_of_a_verification_and_one_more() {
    for code in [
        Code::Valid,
        Code::Malformed,
        Code::NotFound,
        Code::Revoked,
        Code::Expired,
        Code::InsufficientScope,
        Code::RateLimited,
    ] {
        let same = code.of_verification().unwrap();
        assert_eq!((code.as_str(), code.is_failed_attempt()), (same.as_str(), same.is_failed_attempt()));
    }
    assert_eq!((Code::Reused.as_str(), Code::Reused.of_verification()), ("REUSED", None));
    assert!(Code::Reused.is_failed_attempt());
    assert!(status::Code::ALL.iter().all(|code| code.as_str() != "REUSED"));
}

// ---- The decision

/// Of generation 5, refreshed now.
fn session() -> Session {
    Session {
        generation: 5,
        refreshed_at: NOW,
        idle: 3600 * SECOND,
        expires_at: NOW + 86_400 * SECOND,
        is_revoked: false,
    }
}

fn presented(generation: i64) -> Presented {
    Presented { generation, by_other_client: false, from_elsewhere: false }
}

fn decide(session: &Session, generation: i64, now: i64) -> Decision {
    refresh::decide(session, &presented(generation), &GRACE, now, || false)
}

#[test]
fn the_latest_token_refreshes_and_the_one_before_it_only_within_the_grace() {
    let session = session();
    for (generation, after, expected) in [
        (5, 0, Decision::Refresh),
        (5, 3599 * SECOND, Decision::Refresh),
        (4, 0, Decision::Retry),
        (4, 10 * SECOND - 1, Decision::Retry),
        (4, 10 * SECOND, Decision::Reuse),
        (4, -SECOND, Decision::Retry),
        (3, 0, Decision::Reuse),
        (1, 0, Decision::Reuse),
        (6, 0, Decision::Reuse),
        (7, 0, Decision::Reuse),
        (i64::MAX - 1, 0, Decision::Reuse),
    ] {
        assert_eq!(decide(&session, generation, NOW + after), expected, "{generation} {after}");
    }
    let none = Grace { length: 0, same_address: false };
    assert_eq!(refresh::decide(&session, &presented(4), &none, NOW, || false), Decision::Reuse);
    assert_eq!(Decision::Refresh.next(&session, &presented(5)), 6);
    assert_eq!(Decision::Retry.next(&session, &presented(4)), 5, "the same as the first time");
    assert_eq!(Decision::Recover.next(&session, &presented(6)), 7);
}

#[test]
fn a_retry_from_elsewhere_is_reuse_only_where_that_is_set() {
    let elsewhere = Presented { from_elsewhere: true, ..presented(4) };
    let strict = Grace { same_address: true, ..GRACE };
    let decide = |presented, grace| refresh::decide(&session(), &presented, &grace, NOW, || false);
    assert_eq!(decide(elsewhere, GRACE), Decision::Retry);
    assert_eq!(decide(elsewhere, strict), Decision::Reuse);
    assert_eq!(decide(presented(4), strict), Decision::Retry);
    let latest = Presented { from_elsewhere: true, ..presented(5) };
    assert_eq!(decide(latest, strict), Decision::Refresh, "an address may change");
}

#[test]
fn one_generation_ahead_is_accepted_only_where_a_failover_set_the_session_back() {
    for (generation, set_back, expected) in [
        (6, true, Decision::Recover),
        (6, false, Decision::Reuse),
        (7, true, Decision::Reuse),
        (5, true, Decision::Refresh),
        (4, true, Decision::Retry),
        (3, true, Decision::Reuse),
    ] {
        let decision = refresh::decide(&session(), &presented(generation), &GRACE, NOW, || set_back);
        assert_eq!(decision, expected, "{generation} {set_back}");
    }
    for generation in [1, 4, 5, 7] {
        refresh::decide(&session(), &presented(generation), &GRACE, NOW, || panic!("asked for nothing"));
    }
}

#[test]
fn another_client_an_ended_session_and_a_late_token_are_refused_in_that_order() {
    let others = Presented { by_other_client: true, ..presented(1) };
    let revoked = Session { is_revoked: true, ..session() };
    let late = NOW + 86_400 * SECOND;
    assert_eq!(refresh::decide(&revoked, &others, &GRACE, late, || false), Decision::OtherClient);
    for generation in 1..8 {
        assert_eq!(decide(&revoked, generation, late), Decision::Revoked, "{generation}");
        assert_eq!(decide(&session(), generation, late), Decision::Expired, "{generation}");
    }
}

#[test]
fn a_session_is_over_at_its_end_and_when_it_was_idle() {
    let idle = session().end();
    assert_eq!(idle, NOW + 3600 * SECOND);
    assert_eq!(decide(&session(), 5, idle - LAST), Decision::Refresh);
    assert_eq!(decide(&session(), 5, idle - LAST + 1), Decision::Expired);
    let ending = Session { expires_at: NOW + 60 * SECOND, ..session() };
    assert_eq!(decide(&ending, 5, NOW + 60 * SECOND - LAST), Decision::Refresh);
    assert_eq!(decide(&ending, 5, NOW + 60 * SECOND - LAST + 1), Decision::Expired);
    let endless = Session { idle: i64::MAX, expires_at: i64::MAX, ..session() };
    assert_eq!(decide(&endless, 5, i64::MAX - LAST), Decision::Refresh);
    let ended = Session { expires_at: i64::MIN, ..session() };
    assert_eq!(decide(&ended, 5, NOW), Decision::Expired);
}

/// What happens to a session, one after the other.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// Time passes, in seconds.
    Wait(i64),
    /// A token is presented: so many before the newest one that was ever issued.
    Present {
        back: usize,
        elsewhere: bool,
        by_other_client: bool,
    },
    Revoke,
    /// The server fails, and a standby goes on that lacks so many refreshes.
    FailOver {
        lost: usize,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0..20_i64).prop_map(Step::Wait),
        1 => (300..900_i64).prop_map(Step::Wait),
        8 => (prop_oneof![6 => Just(0), 3 => Just(1), 1 => 2..5_usize], any::<bool>(), prop::bool::weighted(0.05))
            .prop_map(|(back, elsewhere, by_other_client)| Step::Present { back, elsewhere, by_other_client }),
        1 => Just(Step::Revoke),
        1 => (0..3_usize).prop_map(|lost| Step::FailOver { lost }),
    ]
}

/// What the model knows of a token: it has no generations, only what was given for what, and when.
#[derive(Clone, Copy)]
struct Known {
    /// When it was replaced, and by which one.
    replaced: Option<(i64, usize)>,
    /// Whether the server that is running has issued it.
    is_durable: bool,
}

struct Model {
    tokens: Vec<Known>,
    refreshed_at: i64,
    expires_at: i64,
    idle: i64,
    is_revoked: bool,
    began: i64,
}

impl Model {
    /// The latest token that the running server has issued.
    fn latest(&self) -> usize {
        self.tokens.iter().rposition(|token| token.is_durable).expect("the first one")
    }

    /// The code, and the token that the client gets.
    fn present(
        &mut self,
        token: usize,
        other: bool,
        elsewhere: bool,
        grace: &Grace,
        now: i64,
    ) -> (Code, Option<usize>) {
        if other {
            return (Code::NotFound, None);
        }
        if self.is_revoked {
            return (Code::Revoked, None);
        }
        if now > self.expires_at - LAST || now > self.refreshed_at + self.idle - LAST {
            return (Code::Expired, None);
        }
        let latest = self.latest();
        let known = self.tokens[token];
        let fresh = match known.replaced {
            // The successor is there already, on a server that has lost the refresh it is issued once more.
            None => token == latest,
            Some((_, by)) => token == latest && !self.tokens[by].is_durable,
        };
        if fresh || (token == latest + 1 && self.refreshed_at < self.began) {
            for lost in latest + 1..=token {
                self.tokens[lost].is_durable = true;
            }
            let next = token + 1;
            self.tokens.truncate(next.max(token + 1));
            self.tokens[token].replaced = Some((now, next));
            self.tokens.push(Known { replaced: None, is_durable: true });
            self.refreshed_at = now;
            return (Code::Valid, Some(next));
        }
        match known.replaced {
            Some((at, by))
                if by == latest && now - at < grace.length && !(grace.same_address && elsewhere) =>
            {
                (Code::Valid, Some(by))
            }
            _ => {
                self.is_revoked = true;
                (Code::Reused, None)
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// The row, which knows only the latest generation, says the same of each token as a model that knows all of them.
    #[test]
    fn the_row_decides_as_if_it_remembered_every_token(
        steps in prop::collection::vec(step(), 1..40),
        grace in prop_oneof![Just(0), Just(10), Just(60)],
        same_address in any::<bool>(),
        lifetime in prop_oneof![Just(500_i64), Just(100_000)],
    ) {
        let grace = Grace { length: grace * SECOND, same_address };
        let mut now = NOW;
        let mut row = Session {
            generation: 1,
            refreshed_at: now,
            idle: 800 * SECOND,
            expires_at: now + lifetime * SECOND,
            is_revoked: false,
        };
        let mut began = i64::MIN;
        let mut model = Model {
            tokens: vec![Known { replaced: None, is_durable: true }],
            refreshed_at: now,
            expires_at: row.expires_at,
            idle: row.idle,
            is_revoked: false,
            began,
        };
        let mut rows = vec![row];
        // Token 0 of the model has generation 1.
        let generation = |token: usize| i64::try_from(token).unwrap() + 1;
        let mut issued: HashMap<usize, String> = HashMap::from([(0, (*key().issue(&SUBJECT, 1)).clone())]);
        for step in steps {
            match step {
                Step::Wait(seconds) => now += seconds * SECOND,
                Step::Revoke => {
                    row.is_revoked = true;
                    model.is_revoked = true;
                }
                Step::FailOver { lost } => {
                    now += SECOND;
                    // A revocation is kept here: that it may be lost too is not what this is about.
                    let kept = rows.len().saturating_sub(lost).max(1);
                    let is_revoked = row.is_revoked;
                    rows.truncate(kept);
                    row = Session { is_revoked, ..rows[kept - 1] };
                    began = now;
                    now += SECOND;
                    let latest = usize::try_from(row.generation).unwrap() - 1;
                    for (token, known) in model.tokens.iter_mut().enumerate() {
                        known.is_durable = token <= latest;
                    }
                    model.refreshed_at = row.refreshed_at;
                    model.began = began;
                }
                Step::Present { back, elsewhere, by_other_client } => {
                    let token = (model.tokens.len() - 1).saturating_sub(back);
                    let read = parsed(&issued[&token]);
                    prop_assert!(key().made(&SUBJECT, &read));
                    let presented =
                        Presented { generation: read.generation, by_other_client, from_elsewhere: elsewhere };
                    let decision = refresh::decide(&row, &presented, &grace, now, || row.refreshed_at < began);
                    let next = decision.next(&row, &presented);
                    let outcome = match decision {
                        Decision::Refresh | Decision::Recover => {
                            row.generation = next;
                            row.refreshed_at = now;
                            rows.push(row);
                            (Code::Valid, Some(next))
                        }
                        Decision::Retry => (Code::Valid, Some(next)),
                        Decision::Reuse => {
                            row.is_revoked = true;
                            (Code::Reused, None)
                        }
                        Decision::Expired => (Code::Expired, None),
                        Decision::Revoked => (Code::Revoked, None),
                        Decision::OtherClient => (Code::NotFound, None),
                    };
                    let (code, gets) = model.present(token, by_other_client, elsewhere, &grace, now);
                    prop_assert_eq!(outcome, (code, gets.map(generation)), "{:?}", step);
                    if let Some(gets) = gets {
                        let text = (*key().issue(&SUBJECT, generation(gets))).clone();
                        let before = issued.insert(gets, text.clone());
                        prop_assert!(before.is_none_or(|before| before == text), "one successor");
                    }
                }
            }
        }
    }
}
