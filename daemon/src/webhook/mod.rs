//! Sends one webhook, after the Standard Webhooks specification (https://www.standardwebhooks.com), to an address that
//! was entered in a database. Nothing of the answer is read but its head, which is bounded, in bounded time.

mod sign;

use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, RETRY_AFTER};
use hyper::{Method, Request, Response};
use ipnet::IpNet;
use jiff::Timestamp;
use url::Url;

use crate::contract::WebhookMessage;
use crate::outbound;
use crate::outbound::{Client, Plain, Rules};
use crate::process::duration;

/// From the look-up of the name to the head of the answer.
pub const DEADLINE: Duration = Duration::from_secs(15);

/// What came of an attempt: what the receiver answered, or why there was no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Answered {
        status: u16,
        retry_after: Option<Duration>,
    },
    /// A sentence that names neither the address nor a secret.
    Failed(String),
}

impl Outcome {
    pub fn is_delivered(&self) -> bool {
        matches!(self, Self::Answered { status: 200..=299, .. })
    }

    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Answered { status, .. } => Some(*status),
            Self::Failed(_) => None,
        }
    }

    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Answered { retry_after, .. } => *retry_after,
            Self::Failed(_) => None,
        }
    }

    /// The outcome as it is logged and stored.
    pub fn text(&self) -> String {
        match self {
            Self::Answered { status: status @ 300..=399, .. } => {
                format!("the receiver answered {status}, and redirects are not followed")
            }
            Self::Answered { status, .. } => format!("the receiver answered {status}"),
            Self::Failed(why) => why.clone(),
        }
    }
}

#[derive(Clone, Debug)]
pub struct Sender(Client);

impl Sender {
    /// With networks beyond the public ones that may be sent to.
    pub fn new(allowed: &[IpNet]) -> Self {
        Self(Client::new(Rules::new(allowed, "--webhook-allow", Plain::Allowed)))
    }

    /// Takes no longer than [`DEADLINE`].
    pub async fn send(&self, message: &WebhookMessage) -> Outcome {
        match tokio::time::timeout(DEADLINE, self.try_send(message)).await {
            Ok(Ok(response)) => Outcome::Answered {
                status: response.status().as_u16(),
                // Its other form, a date, is rare, and then our own delays hold.
                retry_after: response
                    .headers()
                    .get(RETRY_AFTER)
                    .and_then(|value| value.to_str().ok()?.trim().parse().ok())
                    .map(|seconds: u32| Duration::from_secs(seconds.into())),
            },
            Ok(Err(why)) => Outcome::Failed(why),
            Err(_) => Outcome::Failed(format!("no answer within {}", duration::text(DEADLINE))),
        }
    }

    async fn try_send(&self, message: &WebhookMessage) -> Result<Response<Bytes>, String> {
        let url = outbound::parse(&message.url)?;
        let request = request(&url, message)?;
        self.0.send(&url, request, None).await
    }
}

fn request(url: &Url, message: &WebhookMessage) -> Result<Request<Full<Bytes>>, String> {
    let at = Timestamp::now().as_second();
    outbound::request(Method::POST, url)
        .header(CONTENT_TYPE, "application/json")
        .header("webhook-id", &message.message_id)
        .header("webhook-timestamp", at)
        .header(
            "webhook-signature",
            sign::signatures(&message.secrets, &message.message_id, at, &message.body),
        )
        .body(Full::from(message.body.clone()))
        .map_err(|_| "the address cannot be asked for".to_owned())
}
