//! The step with signed URLs: a link to a folder that dies on time, and one that works once.

use std::time::Instant;

use anyhow::{Context as _, Result};

use super::{CLIENT, EVENT_DEADLINE, LIFETIME, PAUSE, Walk};
use crate::report::seconds;

const CREATE: &str = "select tollgate.create_url_key('demo')";
const SIGN: &str = "select tollgate.sign_url($1, make_interval(secs => $2), path_prefix => $3, single_use => $4, key => 'demo')";
const VERIFY: &str = "select code from tollgate.verify_signed_url($1, $2, $3)";

const VIDEO: &str = "https://media.example.com/videos/7/index.m3u8";
const FOLDER: &str = "/videos/7/";
const INVITATION: &str = "https://app.example.com/invitations/12";

impl Walk<'_> {
    pub(super) async fn sign_urls(&mut self) -> Result<()> {
        self.report
            .step("Signed URLs: a link that needs no login, and dies on time", &[CREATE, SIGN, VERIFY]);
        let exists = "select count(*) from tollgate.url_keys where name = 'demo' and state = 'signing'";
        if self.owner.query_one(exists, &[]).await?.get::<_, i64>(0) == 0 {
            self.owner.execute(CREATE, &[]).await?;
        }
        let link = self.sign(VIDEO, Some(FOLDER), false).await?;
        let began = Instant::now();
        for (what, url, method, expected) in [
            ("a link to a video, signed for a folder", link.clone(), "GET", "VALID"),
            ("another file there", link.replace("index.m3u8", "segment-0001.ts"), "GET", "VALID"),
            ("another folder", link.replace("/7/", "/8/"), "GET", "BAD_SIGNATURE"),
            (
                "the way out of the folder",
                link.replace("index.m3u8", "%2e%2e/8/index.m3u8"),
                "GET",
                "MALFORMED",
            ),
            ("a parameter more", format!("{link}&admin=1"), "GET", "BAD_SIGNATURE"),
            ("another method", link.clone(), "PUT", "METHOD_NOT_ALLOWED"),
        ] {
            let came = self.code_of(&url, method).await?;
            self.report.check(what, expected, came);
        }
        let came = loop {
            let code = self.code_of(&link, "GET").await?;
            if code != "VALID" || began.elapsed() > LIFETIME + EVENT_DEADLINE {
                break code;
            }
            tokio::time::sleep(PAUSE).await;
        };
        self.report.check(&format!("the link after {}", seconds(began.elapsed())), "EXPIRED", came);

        let invitation = self.sign(INVITATION, None, true).await?;
        for (what, expected) in [("a link for one use", "VALID"), ("the same again", "ALREADY_USED")] {
            let came = self.code_of(&invitation, "GET").await?;
            self.report.check(what, expected, came);
        }
        Ok(())
    }

    async fn sign(&self, url: &str, prefix: Option<&str>, single_use: bool) -> Result<String> {
        let row = self.issuer.query_one(SIGN, &[&url, &LIFETIME.as_secs_f64(), &prefix, &single_use]).await;
        Ok(row.context("cannot sign a URL")?.try_get(0)?)
    }

    async fn code_of(&self, url: &str, method: &str) -> Result<String> {
        Ok(self.app.query_one(VERIFY, &[&url, &method, &CLIENT]).await?.try_get(0)?)
    }
}
