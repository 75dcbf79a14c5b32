//! A token of a trusted issuer that proves a service account, because its claims have the values that the account trusts
//! (`tollgate.trust_workload`). What it gets ends with it where it is revoked, and not at its own end.

use super::refusal::{Condition, Refusal};
use super::request::Request;
use crate::store::services;
use crate::verify::look_up::look_up_workload;
use tollgate_core::ancestry::Ancestor;
use tollgate_core::issuer::unmet;
use tollgate_core::json;
use tollgate_core::status::Code;

pub(super) fn prove(text: &str, request: &Request<'_>) -> Result<Vec<Ancestor>, Refusal> {
    let refuse = |condition| Err(Refusal::client(condition));
    // By the rules of its issuer: key, signature, audience, type, age, revocation.
    let judged = look_up_workload(text, request.client);
    let (code, token) = (judged.code, judged.token);
    if let Some(root) = judged.root {
        root.close();
    }
    let Some(token) = token.filter(|_| code == Code::Valid) else { return refuse(Condition::Workload(code)) };
    // One of ours proves a user of ours, and no workload.
    if token.terms().is_none() {
        return refuse(Condition::Ours);
    }
    let claims = token.parsed_claims();
    let mut condition = Condition::NoWorkload;
    for trusted in services::workloads(request.client_id, token.issuer()) {
        let Ok(conditions) = json::parse_object(&trusted.conditions) else { continue };
        if let Some(path) = unmet(claims, &conditions) {
            condition = Condition::Claim(path.to_owned());
        } else if trusted.audience.as_ref().is_some_and(|named| claims.aud().all(|one| one != named)) {
            condition = Condition::Audience;
        } else {
            // Its user may be revoked beside it.
            let user = Ancestor::User { id: token.user_id().to_owned(), mark: token.users_mark() };
            return Ok(vec![token.as_ancestor(), user]);
        }
    }
    refuse(condition)
}
