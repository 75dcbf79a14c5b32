//! Tokens derived from their numbers, so that the client knows them.

use std::ops::Range;
use std::thread;

use anyhow::{Result, ensure};
use sha2::{Digest as _, Sha256};
use tollgate_core::token::{ENTROPY_LEN, Issued, Prefix, issue};
use uuid::Uuid;

/// Concatenated without a separator: ten million separate strings would take twice the memory.
pub(crate) struct Tokens {
    text: String,
    length: usize,
}

impl Tokens {
    /// The first `count` tokens.
    pub(crate) fn new(count: u32) -> Result<Self> {
        Self::of(0..count)
    }

    /// The tokens with these numbers.
    pub(crate) fn of(numbers: Range<u32>) -> Result<Self> {
        let length = token(0).token().len();
        let workers = u32::try_from(thread::available_parallelism()?.get())?;
        let share = u32::try_from(numbers.len())?.div_ceil(workers).max(1);
        let text = thread::scope(|scope| {
            let workers: Vec<_> = (0..workers)
                .map(|worker| {
                    let at = |position: u32| (numbers.start + position * share).min(numbers.end);
                    let numbers = at(worker)..at(worker + 1);
                    scope.spawn(move || {
                        let mut text = String::with_capacity(numbers.len() * length);
                        numbers.for_each(|number| text.push_str(token(number).token()));
                        text
                    })
                })
                .collect();
            workers.into_iter().map(|worker| worker.join().expect("making tokens does not fail")).collect()
        });
        Ok(Self { text, length })
    }

    /// Other texts, of one length.
    pub(crate) fn of_texts(texts: &[String]) -> Result<Self> {
        let length = texts.first().map_or(0, String::len);
        ensure!(length > 0 && texts.iter().all(|text| text.len() == length), "the tokens differ in length");
        Ok(Self { text: texts.concat(), length })
    }

    /// The same tokens with another last character, so that only the checksum is wrong.
    pub(crate) fn malformed(&self) -> Self {
        let spoil = |token: &str| {
            let (rest, last) = token.split_at(token.len() - 1);
            format!("{rest}{}", if last == "0" { "1" } else { "0" })
        };
        Self { text: (0..self.len()).map(|index| spoil(self.get(index))).collect(), length: self.length }
    }

    pub(crate) fn len(&self) -> usize {
        self.text.len() / self.length
    }

    pub(crate) fn get(&self, index: usize) -> &str {
        &self.text[index * self.length..(index + 1) * self.length]
    }

    pub(crate) fn random(&self, random: &mut Random) -> &str {
        self.get(random.below(self.len()))
    }
}

pub(crate) fn token(number: u32) -> Issued {
    let mut bytes = [0; ENTROPY_LEN];
    for (chunk, part) in bytes.chunks_mut(16).zip(["1", "2", "3"]) {
        let random = entropy(number, part);
        chunk.copy_from_slice(&random[..chunk.len()]);
    }
    issue(&Prefix::default(), &bytes)
}

pub(crate) fn id(number: u32) -> Uuid {
    Uuid::from_bytes(entropy(number, "id"))
}

/// As stored by the server.
pub(crate) fn hash(token: &str) -> String {
    Sha256::digest(token.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The same for the same number in every run.
fn entropy(number: u32, part: &str) -> [u8; 16] {
    let digest = Sha256::digest(format!("tollgate bench {part} {number}"));
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    bytes
}

/// SplitMix64: a few instructions per number.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new() -> Self {
        let (high, low) = Uuid::new_v4().as_u64_pair();
        Self(high ^ low)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^= x >> 31;
        x as usize % limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_kept_as_they_are_made() {
        let tokens = Tokens::new(101).expect("tokens");
        assert_eq!(tokens.len(), 101);
        for number in [0, 50, 51, 100] {
            assert_eq!(tokens.get(number), token(u32::try_from(number).expect("small")).token());
        }
        let later = Tokens::of(50..101).expect("tokens");
        assert_eq!((later.len(), later.get(1)), (51, tokens.get(51)));
        assert_ne!(later.malformed().get(1), later.get(1));
    }
}
