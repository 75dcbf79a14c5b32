//! The hooks of the setting that holds the identity.
#![allow(unsafe_code)]

#[pgrx::pg_schema]
mod tests {
    use crate::identity;
    use crate::identity::{Credential, Identity};
    use crate::pg::sys;
    use pgrx::prelude::*;

    fn context(user_id: &str, expires_at: Option<i64>) -> Identity {
        Identity {
            token_id: [9; 16],
            user_id: user_id.to_owned(),
            scopes: vec!["posts:*".to_owned()],
            expires_at,
            signed: None,
        }
    }

    /// As `authenticate` does with an API token.
    fn establish(context: Identity) {
        identity::establish(Credential::ApiToken(context.token_id), context);
    }

    /// Establishes another identity of the same token in a savepoint that is rolled back, which gives the assign hook the
    /// earlier value again, as text.
    fn establish_and_roll_back() {
        // SAFETY: as PL/pgSQL does for a block with an EXCEPTION clause.
        unsafe {
            let (memory, owner) = (pg_sys::CurrentMemoryContext, pg_sys::CurrentResourceOwner);
            pg_sys::BeginInternalSubTransaction(core::ptr::null());
            establish(context("rolled back", None));
            pg_sys::RollbackAndReleaseCurrentSubTransaction();
            pg_sys::MemoryContextSwitchTo(memory);
            pg_sys::CurrentResourceOwner = owner;
        }
    }

    fn user() -> Option<String> {
        identity::read(|context| context.user_id.clone())
    }

    #[pg_test]
    fn an_established_identity_is_read_back_whatever_it_contains() {
        assert_eq!(user(), None);
        let awkward = [
            "",
            "plain",
            "quotes ' \" ` and \\ backslashes \\\\",
            "{\"token_id\": null}",
            "line\nfeed\ttab\r\u{1}\u{7f}",
            "ärger ☃ 🔑 \u{202e}",
            &"long ".repeat(50_000),
        ];
        for text in awkward {
            let scopes = vec![text.to_owned(), String::new(), "posts:*".to_owned()];
            let established = Identity { scopes: scopes.clone(), ..context(text, Some(i64::MAX)) };
            establish(established);
            let expected = Some(([9; 16], text.to_owned(), scopes));
            let read = || {
                identity::read(|context| (context.token_id, context.user_id.clone(), context.scopes.clone()))
            };
            assert_eq!(read(), expected);
            establish_and_roll_back();
            assert_eq!(read(), expected, "parsed");
        }
    }

    #[pg_test]
    fn an_identity_ends_at_its_expiry_and_not_after_it() {
        let now = sys::GetCurrentTimestamp();
        for (expires_at, ended) in [
            (None, false),
            (Some(now + 60_000_000), false),
            (Some(i64::MAX), false),
            (Some(now), true),
            (Some(now - 1), true),
            (Some(i64::MIN), true),
        ] {
            establish(context("someone", expires_at));
            assert_eq!(user().is_none(), ended, "{expires_at:?}, now {now}");
        }
    }

    /// Tries to set the setting to its current value, as a superuser.
    fn refused_to_set() -> bool {
        PgTryBuilder::new(|| {
            Spi::run("select set_config('tollgate.context', current_setting('tollgate.context'), true)")
                .expect("a statement");
            false
        })
        .catch_when(PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE, |_| true)
        .execute()
    }

    #[pg_test]
    fn the_setting_is_protected_again_after_each_establishment() {
        establish(context("someone", None));
        assert!(refused_to_set());
    }

    #[pg_test]
    fn the_setting_is_protected_again_after_a_failed_establishment() {
        establish(context("first", None));
        let failed = PgTryBuilder::new(|| {
            // SAFETY: left again below, whether or not an ERROR is raised in between.
            unsafe { pg_sys::EnterParallelMode() };
            establish(Identity { token_id: [8; 16], ..context("second", None) });
            false
        })
        .catch_others(|_| true)
        .finally(|| {
            // SAFETY: entered above.
            unsafe { pg_sys::ExitParallelMode() };
        })
        .execute();
        assert!(failed, "a setting could be set in a parallel operation");
        assert_eq!(user().as_deref(), Some("first"));
        assert!(refused_to_set());
        assert!(identity::may_bind(Credential::ApiToken([9; 16])).is_ok());
        assert!(
            identity::may_bind(Credential::ApiToken([8; 16])).is_err(),
            "a failed establishment has bound the transaction"
        );
    }
}
