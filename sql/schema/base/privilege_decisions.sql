-- Privileges: the decision about each object, in one place. grant_capability, the privileges of an installation and of
-- an upgrade, and the tests all use it; a test fails for each object without a decision.

CREATE VIEW tollgate.privilege_decisions AS
    SELECT d.object_type, 'tollgate.' || d.object AS object, d.given_to
    FROM (VALUES
        -- Everyone: discloses nothing but the caller's own context and arguments.
        ('FUNCTION', 'client_ip_from(text, cidr[])',                          'public'),
        ('FUNCTION', 'current_actor()',                                       'public'),
        ('FUNCTION', 'current_claims()',                                      'public'),
        ('FUNCTION', 'current_issuer()',                                      'public'),
        ('FUNCTION', 'current_scopes()',                                      'public'),
        ('FUNCTION', 'current_session_id()',                                  'public'),
        ('FUNCTION', 'current_token_id()',                                    'public'),
        ('FUNCTION', 'current_user_id()',                                     'public'),
        ('FUNCTION', 'list_own_capabilities()',                               'public'),
        ('FUNCTION', 'require_scope(text)',                                   'public'),
        ('FUNCTION', 'scope_grants(text[], text)',                            'public'),
        ('FUNCTION', 'token_has_all_scopes(text[])',                          'public'),
        ('FUNCTION', 'token_has_any_scope(text[])',                           'public'),
        ('FUNCTION', 'token_has_scope(text)',                                 'public'),

        -- Verifies, acts for a token, and revokes presented tokens.
        ('FUNCTION', 'authenticate(text, text[], inet)',                      'verifier'),
        ('FUNCTION', 'jwks()',                                                'verifier'),
        ('FUNCTION', 'last_refusal()',                                        'verifier'),
        ('FUNCTION', 'revoke_access_token(text, text, inet)',                 'verifier'),
        ('FUNCTION', 'revoke_own_api_token(uuid, text)',                      'verifier'),
        ('FUNCTION', 'revoke_presented_token(text, text, inet)',              'verifier'),
        ('FUNCTION', 'token_has_scope(text, text, inet)',                     'verifier'),
        ('FUNCTION', 'verify_access_token(text, text[], inet, text)',         'verifier'),
        ('FUNCTION', 'verify_api_token(text, text[], inet)',                  'verifier'),
        ('FUNCTION', 'verify_api_token_hash(bytea, text[], inet)',            'verifier'),
        ('TYPE',     'verification',                                          'verifier'),

        -- Issues, lists, rotates, disables and revokes tokens.
        ('FUNCTION', 'access_token_usage(text)',                              'issuer'),
        ('FUNCTION', 'create_api_token(text, text, text[], interval, jsonb, cidr[], integer, interval, text, timestamptz)', 'issuer'),
        ('FUNCTION', 'derive_api_token(text, text, text[], interval, cidr[], inet, timestamptz)', 'issuer'),
        ('FUNCTION', 'import_api_token(text, text, bytea, text[], interval, jsonb, cidr[], integer, interval, text, timestamptz, timestamptz, timestamptz, timestamptz, timestamptz)', 'issuer'),
        ('FUNCTION', 'issue_access_token(text, text[], text[], interval, jsonb)', 'issuer'),
        ('FUNCTION', 'list_api_tokens(text, integer, uuid)',                  'issuer'),
        ('FUNCTION', 'list_scopes()',                                         'issuer'),
        ('FUNCTION', 'list_sessions(text)',                                   'issuer'),
        ('FUNCTION', 'open_session(text, text[], text[], text, interval, interval, text, inet, jsonb)', 'issuer'),
        ('FUNCTION', 'refresh_session(text, text, text[], inet)',             'issuer'),
        ('FUNCTION', 'revoke_access_token(uuid, text)',                       'issuer'),
        ('FUNCTION', 'revoke_all_api_tokens(text, text)',                     'issuer'),
        ('FUNCTION', 'revoke_all_sessions(text, text)',                       'issuer'),
        ('FUNCTION', 'revoke_api_token(uuid, text, text)',                    'issuer'),
        ('FUNCTION', 'revoke_session(uuid, text, text)',                      'issuer'),
        ('FUNCTION', 'revoke_user(text, text)',                               'issuer'),
        ('FUNCTION', 'rotate_api_token(uuid, interval, interval, timestamptz, boolean)', 'issuer'),
        ('FUNCTION', 'set_api_token_enabled(uuid, boolean, text)',            'issuer'),
        ('FUNCTION', 'token_activity(uuid, timestamptz)',                     'issuer'),
        ('FUNCTION', 'quota_remaining(uuid)',                                 'issuer'),
        ('FUNCTION', 'token_quota(uuid)',                                     'issuer'),
        ('FUNCTION', 'user_quota(text)',                                      'issuer'),
        ('TYPE',     'quota_state',                                           'issuer'),
        ('TYPE',     'issued_access_token',                                   'issuer'),
        ('TYPE',     'issued_session',                                        'issuer'),
        ('TYPE',     'issued_token',                                          'issuer'),
        ('TYPE',     'refreshed_session',                                     'issuer'),

        -- Manages what the others work with, and sees its status.
        ('FUNCTION', 'attach_users_table(regclass, name, boolean, text, text)', 'admin'),
        ('FUNCTION', 'define_scope(text, text)',                              'admin'),
        ('FUNCTION', 'define_webhook(text, text, text[])',                    'admin'),
        ('FUNCTION', 'deployment_health(interval)',                           'admin'),
        ('FUNCTION', 'detach_users_table(regclass)',                          'admin'),
        ('FUNCTION', 'drop_scope(text)',                                      'admin'),
        ('FUNCTION', 'drop_subscription(text)',                               'admin'),
        ('FUNCTION', 'drop_webhook(text)',                                    'admin'),
        ('FUNCTION', 'find_api_tokens(text, text, text, text, integer, uuid)', 'admin'),
        ('FUNCTION', 'grant_capability(regrole, text)',                       'admin'),
        ('FUNCTION', 'list_capability_grants()',                              'admin'),
        ('FUNCTION', 'list_users_tables()',                                   'admin'),
        ('FUNCTION', 'pause_webhook(text)',                                  'admin'),
        ('FUNCTION', 'purge_audit_log(timestamptz, integer)',                 'admin'),
        ('FUNCTION', 'replay_webhook(text, bigint)',                          'admin'),
        ('FUNCTION', 'resume_webhook(text)',                                 'admin'),
        ('FUNCTION', 'revoke_capability(regrole, text)',                      'admin'),
        ('FUNCTION', 'rotate_webhook_secret(text, interval)',                 'admin'),
        ('FUNCTION', 'set_webhook_enabled(text, boolean)',                    'admin'),
        ('FUNCTION', 'set_webhook_url(text, text)',                          'admin'),
        ('FUNCTION', 'stats()',                                               'admin'),
        ('FUNCTION', 'subscription_backlogs(integer)',                        'admin'),
        ('FUNCTION', 'update_api_token(uuid, jsonb)',                         'admin'),
        ('FUNCTION', 'verify_audit_log(bigint, bytea)',                       'admin'),
        ('TYPE',     'audit_verification',                                    'admin'),
        ('VIEW',     'capability_grants',                                     'admin'),
        ('VIEW',     'capability_privileges',                                 'admin'),
        ('VIEW',     'daemons',                                               'admin'),
        ('VIEW',     'tokens',                                                'admin'),
        ('VIEW',     'webhook_deliveries',                                    'admin'),
        ('VIEW',     'webhooks',                                              'admin'),

        -- Manages signing keys.
        ('FUNCTION', 'create_signing_key(text, interval)',                    'admin'),
        ('FUNCTION', 'import_signing_key(text, interval)',                    'admin'),
        ('FUNCTION', 'key_status()',                                          'admin'),
        ('FUNCTION', 'list_master_keys()',                                    'admin'),
        ('FUNCTION', 'list_signing_keys()',                                   'admin'),
        ('FUNCTION', 'reseal_signing_keys()',                                 'admin'),
        ('FUNCTION', 'rotate_signing_key(interval)',                          'admin'),
        ('FUNCTION', 'withdraw_signing_key(text, text)',                      'admin'),
        ('VIEW',     'signing_keys',                                          'admin'),

        -- Decides how much may be used.
        ('FUNCTION', 'add_credits(uuid, text, bigint)',                       'admin'),
        ('FUNCTION', 'list_quotas(integer, uuid)',                            'admin'),
        ('FUNCTION', 'remove_quota(uuid, text, text)',                        'admin'),
        ('FUNCTION', 'set_quota(uuid, text, bigint, text, text, bigint, text)', 'admin'),

        -- Decides whose tokens are accepted.
        ('FUNCTION', 'distrust_issuer(text, text)',                           'admin'),
        ('FUNCTION', 'list_trusted_issuers()',                                'admin'),
        ('FUNCTION', 'trust_issuer(text, text, text[], jsonb, text, text[], text, text[], text[], text[], jsonb, interval)', 'admin'),
        ('VIEW',     'trusted_issuers',                                       'admin'),

        -- Fetches the keys of trusted issuers. Not the operator's: it could sign as any of those issuers.
        ('FUNCTION', 'issuers_due()',                                         'key_fetcher'),
        ('FUNCTION', 'note_issuer_failure(text, text)',                       'key_fetcher'),
        ('FUNCTION', 'store_issuer_keys(text, text, interval)',               'key_fetcher'),

        -- What the daemon needs, and nothing else.
        ('FUNCTION', 'ack_usage(bigint)',                                     'operator'),
        ('FUNCTION', 'acquire_leadership(text)',                              'operator'),
        ('FUNCTION', 'admit_event_reader(bytea, inet)',                       'operator'),
        ('FUNCTION', 'advance_subscription(text, tollgate.event_cursor, bytea)', 'operator'),
        ('FUNCTION', 'announce_expiries(interval, integer)',                  'operator'),
        ('FUNCTION', 'announce_expiries_after(interval, integer, timestamptz, uuid)', 'operator'),
        ('FUNCTION', 'announce_session_expiries(interval, integer)',          'operator'),
        ('FUNCTION', 'apply_findings(tollgate.finding[])',                    'operator'),
        ('FUNCTION', 'apply_usage(text, uuid, bigint, tollgate.usage_row[], bytea)', 'operator'),
        ('FUNCTION', 'check_leadership(text, bigint)',                        'operator'),
        ('FUNCTION', 'claim_webhook_deliveries(integer, interval)',           'operator'),
        ('FUNCTION', 'deployment_health(interval)',                           'operator'),
        ('FUNCTION', 'drain_findings()',                                      'operator'),
        ('FUNCTION', 'drain_usage()',                                         'operator'),
        ('FUNCTION', 'event_position(bigint)',                                'operator'),
        ('FUNCTION', 'expire_tokens(integer)',                                'operator'),
        ('FUNCTION', 'expire_tokens_after(integer, timestamptz, uuid)',       'operator'),
        ('FUNCTION', 'finish_webhook_delivery(bigint, uuid, integer, text, interval)', 'operator'),
        ('FUNCTION', 'has_events(tollgate.event_cursor)',                     'operator'),
        ('FUNCTION', 'invalidate_sessions(timestamptz)',                      'operator'),
        ('FUNCTION', 'key_status()',                                          'operator'),
        ('FUNCTION', 'list_trusted_issuers()',                                'operator'),
        ('FUNCTION', 'open_subscription(text)',                               'operator'),
        ('FUNCTION', 'purge_audit_log(timestamptz, integer)',                 'operator'),
        ('FUNCTION', 'purge_denials(integer)',                                'operator'),
        ('FUNCTION', 'purge_sessions(interval, integer)',                     'operator'),
        ('FUNCTION', 'purge_sessions_after(interval, integer, uuid)',         'operator'),
        ('FUNCTION', 'purge_tokens(interval, integer)',                       'operator'),
        ('FUNCTION', 'purge_tokens_after(interval, integer, timestamptz, uuid)', 'operator'),
        ('FUNCTION', 'purge_webhook_deliveries(interval, integer)',           'operator'),
        ('FUNCTION', 'queue_webhook_deliveries(integer)',                     'operator'),
        ('FUNCTION', 'purge_usage(interval, integer)',                        'operator'),
        ('FUNCTION', 'purge_usage_after(interval, integer, timestamptz, uuid)', 'operator'),
        ('FUNCTION', 'purge_user_usage_after(interval, integer, uuid)',       'operator'),
        ('FUNCTION', 'read_events(tollgate.event_cursor, integer)',           'operator'),
        ('FUNCTION', 'report_daemon(uuid, text, integer, text, timestamptz, jsonb)', 'operator'),
        ('FUNCTION', 'rotate_due_signing_key(interval)',                      'operator'),
        ('FUNCTION', 'seal_audit_log(integer)',                               'operator'),
        ('FUNCTION', 'stats()',                                               'operator'),
        ('FUNCTION', 'subscription_backlogs(integer)',                        'operator'),
        ('FUNCTION', 'usage_applied(text, uuid, bigint)',                     'operator'),
        ('FUNCTION', 'usage_pressure()',                                      'operator'),
        ('TYPE',     'event_batch',                                           'operator'),
        ('TYPE',     'event_cursor',                                          'operator'),
        ('TYPE',     'finding',                                               'operator'),
        ('FUNCTION', 'drain_quota_wishes()',                                  'operator'),
        ('FUNCTION', 'forget_removed_quotas()',                               'operator'),
        ('FUNCTION', 'lease_quotas(tollgate.quota_wish[])',                   'operator'),
        ('TYPE',     'quota_wish',                                            'operator'),
        ('TYPE',     'usage_row',                                             'operator'),
        ('TYPE',     'webhook_message',                                       'operator'),
        ('VIEW',     'daemons',                                               'operator'),
        ('VIEW',     'trusted_issuers',                                       'operator'),
        ('VIEW',     'webhooks',                                              'operator'),

        -- Internal: granted to no role. Tables and sequences are internal without being listed here.
        ('FUNCTION', 'acting_role()',                                         'internal'),
        ('FUNCTION', 'advance_sequence(regclass, bigint)',                   'internal'),
        ('FUNCTION', 'ancestors(uuid)',                                       'internal'),
        ('FUNCTION', 'append_seal(tollgate.audit_seals)',                     'internal'),
        ('FUNCTION', 'advise_on_users_table(regclass, smallint, text)',       'internal'),
        ('FUNCTION', 'attach_trigger(regclass, name, text, text, name, text[], text)', 'internal'),
        ('FUNCTION', 'attached_users_tables()',                               'internal'),
        ('FUNCTION', 'begin_batch(tollgate.event_cursor)',                    'internal'),
        ('FUNCTION', 'check_read_committed(text, text, text)',                'internal'),
        ('FUNCTION', 'capability_acls(text)',                                 'internal'),
        ('FUNCTION', 'capability_objects(text)',                              'internal'),
        ('FUNCTION', 'announce_session_expiries_after(interval, integer, timestamptz, uuid)', 'internal'),
        ('FUNCTION', 'carrying_signature(text, bytea[])',                     'internal'),
        ('FUNCTION', 'change_webhook_backlog(text, bigint, bigint, bigint, timestamptz)', 'internal'),
        ('FUNCTION', 'check_batch_size(integer, integer)',                    'internal'),
        ('FUNCTION', 'check_capability(regrole, text)',                       'internal'),
        ('FUNCTION', 'check_cursor(tollgate.event_cursor)',                   'internal'),
        ('FUNCTION', 'check_event_count(integer)',                            'internal'),
        ('FUNCTION', 'check_json(text, jsonb, integer, integer)',             'internal'),
        ('FUNCTION', 'check_page_size(integer)',                              'internal'),
        ('FUNCTION', 'check_retention(interval)',                             'internal'),
        ('FUNCTION', 'check_sessions_ended(uuid, text[])',                    'internal'),
        ('FUNCTION', 'check_snapshot(uuid, text[])',                          'internal'),
        ('FUNCTION', 'check_token_fields(text[], text, text[], timestamptz, jsonb, cidr[], integer, interval)', 'internal'),
        ('FUNCTION', 'check_user_named(text)',                                'internal'),
        ('FUNCTION', 'check_users_condition(oid, text)',                      'internal'),
        ('FUNCTION', 'check_users_key(oid, smallint)',                        'internal'),
        ('FUNCTION', 'check_users_table(regclass)',                           'internal'),
        ('FUNCTION', 'check_webhook_url(text)',                              'internal'),
        ('FUNCTION', 'check_within_parent(tollgate.api_tokens, tollgate.api_tokens)', 'internal'),
        ('FUNCTION', 'claim_token_slot(text)',                                'internal'),
        ('FUNCTION', 'close_usage()',                                         'internal'),
        ('FUNCTION', 'count_webhook_messages()',                             'internal'),
        ('FUNCTION', 'continue_walk(text, text, interval, integer, interval)', 'internal'),
        ('FUNCTION', 'create_refresh_key()',                                  'internal'),
        ('FUNCTION', 'current_epoch()',                                       'internal'),
        ('FUNCTION', 'check_issuer_fields(text, text, text[], text[], text, text[], text[], text[], jsonb, interval)', 'internal'),
        ('FUNCTION', 'check_key_source(text, jsonb, text)',                   'internal'),
        ('FUNCTION', 'check_prefix(text, text)',                              'internal'),
        ('FUNCTION', 'denial_of(text)',                                       'internal'),
        ('FUNCTION', 'deny_access_token(text, text, uuid, timestamptz, text, text)', 'internal'),
        ('FUNCTION', 'issuer_detail(text)',                                   'internal'),
        ('FUNCTION', 'issuer_faults()',                                       'internal'),
        ('FUNCTION', 'lock_issuers()',                                        'internal'),
        ('FUNCTION', 'read_jwks(text, text[])',                               'internal'),
        ('FUNCTION', 'replace_issuer_keys(text, text)',                       'internal'),
        ('FUNCTION', 'settle_prefixes()',                                     'internal'),
        ('FUNCTION', 'unknown_key_at(text)',                                  'internal'),
        ('FUNCTION', 'descendants(uuid)',                                     'internal'),
        ('FUNCTION', 'digest_of(bytea[])',                                    'internal'),
        ('FUNCTION', 'disable_tokens_of_users(text[], jsonb)',                'internal'),
        ('FUNCTION', 'disable_webhook(text, text)',                           'internal'),
        ('FUNCTION', 'drop_users_triggers(regclass)',                         'internal'),
        ('FUNCTION', 'enable_tokens_of_users(text[], jsonb)',                 'internal'),
        ('FUNCTION', 'end_access_and_notify(text[], text, jsonb)',            'internal'),
        ('FUNCTION', 'end_access_of_users(text[], text, jsonb)',              'internal'),
        ('FUNCTION', 'end_batch(tollgate.event_cursor)',                      'internal'),
        ('FUNCTION', 'end_reused_session(uuid, bigint, bigint, inet)',        'internal'),
        ('FUNCTION', 'end_sessions(uuid[], text, jsonb)',                     'internal'),
        ('FUNCTION', 'end_sessions_of_users(text[], text, jsonb)',            'internal'),
        ('FUNCTION', 'epoch_identity(integer)',                               'internal'),
        ('FUNCTION', 'epoch_lineage(integer)',                                'internal'),
        ('FUNCTION', 'epoch_of_cursor(uuid)',                                 'internal'),
        ('FUNCTION', 'fault_of_stretch(tollgate.audit_seals, tollgate.audit_place, boolean)', 'internal'),
        ('FUNCTION', 'final_place()',                                         'internal'),
        ('FUNCTION', 'first_pending(tollgate.event_cursor, integer)',         'internal'),
        ('FUNCTION', 'finding_is_settled(uuid, timestamptz, bytea)',          'internal'),
        ('FUNCTION', 'found()',                                               'internal'),
        ('FUNCTION', 'free_finding(bigint)',                                  'internal'),
        ('FUNCTION', 'free_usage(bigint)',                                    'internal'),
        ('FUNCTION', 'forget_dropped_roles()',                                'internal'),
        ('FUNCTION', 'give_capability(oid, text)',                            'internal'),
        ('FUNCTION', 'presented_access_token(text, inet)',                    'internal'),
        ('FUNCTION', 'purge_denied_after(integer, timestamptz, text)',        'internal'),
        ('FUNCTION', 'purge_revoked_users_after(integer, timestamptz, text)', 'internal'),
        ('FUNCTION', 'record_issue(uuid, text, jsonb)',                       'internal'),
        ('FUNCTION', 'usage_id_of_user(text)',                                'internal'),
        ('FUNCTION', 'handed_out_usage()',                                    'internal'),
        ('FUNCTION', 'hash_of_seal(tollgate.audit_seals, bytea)',             'internal'),
        ('FUNCTION', 'hide_bind_values(oid)',                                 'internal'),
        ('FUNCTION', 'host_of_url(text)',                                    'internal'),
        ('FUNCTION', 'give_digest(uuid, bytea)',                              'internal'),
        ('FUNCTION', 'intersect_networks(cidr[], cidr[])',                    'internal'),
        ('FUNCTION', 'intersect_scopes(text[], text[])',                      'internal'),
        ('FUNCTION', 'is_logical_worker()',                                  'internal'),
        ('FUNCTION', 'is_refresh_token(text)',                                'internal'),
        ('FUNCTION', 'is_purging_audit_log()',                                'internal'),
        ('FUNCTION', 'last_purged_seal()',                                    'internal'),
        ('FUNCTION', 'leave_out()',                                          'internal'),
        ('FUNCTION', 'leadership_of(text)',                                   'internal'),
        ('FUNCTION', 'limit_within(integer, interval, integer, interval)',    'internal'),
        ('FUNCTION', 'json_digest(jsonb)',                                    'internal'),
        ('FUNCTION', 'json_text_size(jsonb, integer, integer)',               'internal'),
        ('FUNCTION', 'lock_for_rotation(uuid)',                               'internal'),
        ('FUNCTION', 'lock_leadership(text)',                                 'internal'),
        ('FUNCTION', 'lock_managed_token(uuid, boolean)',                     'internal'),
        ('FUNCTION', 'lock_seals(text)',                                      'internal'),
        ('FUNCTION', 'lock_token(uuid, boolean)',                             'internal'),
        ('FUNCTION', 'lock_token_slots(text)',                                'internal'),
        ('FUNCTION', 'lock_tokens_of_users(text[])',                          'internal'),
        ('FUNCTION', 'make_snapshot(xid8[], xid8)',                           'internal'),
        ('FUNCTION', 'measure_stretch(tollgate.audit_place, tollgate.audit_place)', 'internal'),
        ('FUNCTION', 'live_successors(uuid)',                                 'internal'),
        ('FUNCTION', 'memory_stats()',                                        'internal'),
        ('FUNCTION', 'narrow_descendants(tollgate.api_tokens, text)',         'internal'),
        ('FUNCTION', 'network_contains(cidr, cidr)',                          'internal'),
        ('FUNCTION', 'networks_contain(cidr[], cidr[])',                      'internal'),
        ('FUNCTION', 'next_id(regclass)',                                    'internal'),
        ('FUNCTION', 'new_webhook_secret()',                                  'internal'),
        ('FUNCTION', 'no_such_webhook(text)',                                 'internal'),
        ('FUNCTION', 'note_client_mismatch(uuid, text, inet)',                'internal'),
        ('FUNCTION', 'note_retry_elsewhere(uuid, bigint, inet)',              'internal'),
        ('FUNCTION', 'note_session(text, uuid, text, jsonb)',                 'internal'),
        ('FUNCTION', 'notify_family_event(text, uuid, text, text, bigint)',   'internal'),
        ('FUNCTION', 'notify_of_users(bigint, bigint, text)',                 'internal'),
        ('FUNCTION', 'notify_token_event(text, uuid, text, text, bigint)',    'internal'),
        ('FUNCTION', 'place_after_seal(bigint)',                              'internal'),
        ('FUNCTION', 'place_of_cursor(tollgate.event_cursor)',                'internal'),
        ('FUNCTION', 'place_of_horizon(integer, xid8)',                       'internal'),
        ('FUNCTION', 'place_received_event()',                               'internal'),
        ('FUNCTION', 'presented_session_id(text, inet)',                      'internal'),
        ('FUNCTION', 'presented_token_id(text, inet)',                        'internal'),
        ('FUNCTION', 'purge_messages_after(boolean, interval, integer, timestamptz, bigint)', 'internal'),
        ('FUNCTION', 'purge_is_proven(tollgate.audit_seals, bigint)',         'internal'),
        ('FUNCTION', 'purge_sealed_events(timestamptz, integer)',             'internal'),
        ('FUNCTION', 'query_as(oid, text, text[])',                           'internal'),
        ('FUNCTION', 'ranges_of_batch(tollgate.event_cursor)',                'internal'),
        ('FUNCTION', 'quote_redacted(text)',                                  'internal'),
        ('FUNCTION', 'read_change(tollgate.api_tokens, text, jsonb)',         'internal'),
        ('FUNCTION', 'readable_snapshot(integer)',                            'internal'),
        ('FUNCTION', 'record_reuse(uuid, timestamptz, inet)',                 'internal'),
        ('FUNCTION', 'refuse_audit_change()',                                 'internal'),
        ('FUNCTION', 'refuse_token(uuid, text, text)',                        'internal'),
        ('FUNCTION', 'renew_capability()',                                    'internal'),
        ('FUNCTION', 'replace_webhook_backlog(tollgate.webhook_backlogs)',    'internal'),
        ('FUNCTION', 'replace_token(uuid, uuid, bytea, text, interval, interval, timestamptz, boolean)', 'internal'),
        ('FUNCTION', 'resolve_capability_role()',                             'internal'),
        ('FUNCTION', 'revoke_departed_users()',                               'internal'),
        ('FUNCTION', 'revoke_families(uuid[], text, jsonb)',                  'internal'),
        ('FUNCTION', 'revoke_tokens_of_users(text[], text, jsonb)',           'internal'),
        ('FUNCTION', 'revoke_without_notification(text[], text, jsonb)',      'internal'),
        ('FUNCTION', 'scope_is_valid(text)',                                  'internal'),
        ('FUNCTION', 'sequences_behind()',                                   'internal'),
        ('FUNCTION', 'session_label(name, name, text)',                       'internal'),
        ('FUNCTION', 'timeline_began()',                                      'internal'),
        ('FUNCTION', 'timeline_is_known()',                                   'internal'),
        ('FUNCTION', 'set_webhook_paused(text, boolean)',                    'internal'),
        ('FUNCTION', 'settle_all_users(regclass, text[])',                    'internal'),
        ('FUNCTION', 'settle_and_notify(oid, text[], text[], text)',          'internal'),
        ('FUNCTION', 'settle_findings()',                                     'internal'),
        ('FUNCTION', 'settle_privileges()',                                   'internal'),
        ('FUNCTION', 'settle_user(text)',                                     'internal'),
        ('FUNCTION', 'settle_users(regclass, text[], text[], text)',          'internal'),
        ('FUNCTION', 'signature_of_finding(uuid, timestamptz, inet)',         'internal'),
        ('FUNCTION', 'signature_of_page(tollgate.event_cursor, tollgate.event_cursor)', 'internal'),
        ('FUNCTION', 'signature_of_usage(text, uuid, bigint, tollgate.usage_row[])', 'internal'),
        ('FUNCTION', 'snapshot_contains(pg_snapshot, pg_snapshot)',           'internal'),
        ('FUNCTION', 'states_of_users(regclass, text[], text[])',             'internal'),
        ('FUNCTION', 'stored_reason(text)',                                   'internal'),
        ('FUNCTION', 'system_identifier()',                                   'internal'),
        ('FUNCTION', 'unite_snapshots(pg_snapshot, pg_snapshot)',             'internal'),
        ('FUNCTION', 'issued_detail(tollgate.api_tokens)',                    'internal'),
        ('FUNCTION', 'tokens_are_received()',                                 'internal'),
        ('FUNCTION', 'tokens_estimate()',                                     'internal'),
        ('FUNCTION', 'token_changes(tollgate.api_tokens, tollgate.api_tokens)', 'internal'),
        ('FUNCTION', 'token_is_within(tollgate.api_tokens, tollgate.api_tokens)', 'internal'),
        ('FUNCTION', 'user_is_inactive(uuid)',                                'internal'),
        ('FUNCTION', 'users_in_state(text[], text)',                          'internal'),
        ('FUNCTION', 'users_key(oid, text[])',                                'internal'),
        ('FUNCTION', 'users_row_changed()',                                   'internal'),
        ('FUNCTION', 'users_table_faults()',                                  'internal'),
        ('FUNCTION', 'users_table_arguments(oid)',                            'internal'),
        ('FUNCTION', 'users_with_tokens(text[])',                             'internal'),
        ('FUNCTION', 'wal_timeline()',                                        'internal'),
        ('FUNCTION', 'webhook_backlog(text)',                                 'internal'),
        ('FUNCTION', 'webhook_url(text)',                                     'internal'),
        ('FUNCTION', 'without_token(text, text)',                             'internal'),
        ('FUNCTION', 'add_key(text[], text, interval, text)',                 'internal'),
        ('FUNCTION', 'chain_keys(text, timestamptz)',                         'internal'),
        ('FUNCTION', 'check_signs_in(interval)',                              'internal'),
        ('FUNCTION', 'key_faults()',                                          'internal'),
        ('FUNCTION', 'key_state(timestamptz, timestamptz, timestamptz, timestamptz)', 'internal'),
        ('FUNCTION', 'lock_keys()',                                           'internal'),
        ('FUNCTION', 'make_key(text, text)',                                  'internal'),
        ('FUNCTION', 'master_key_fault()',                                    'internal'),
        ('FUNCTION', 'master_key_ids()',                                      'internal'),
        ('FUNCTION', 'master_key_of(bytea)',                                  'internal'),
        ('FUNCTION', 'read_key(text, text)',                                  'internal'),
        ('FUNCTION', 'reseal_key(bytea, text, text, text)',                   'internal'),
        ('FUNCTION', 'test_signing_key(text)',                                'internal'),
        ('FUNCTION', 'check_quota(bigint, text, text, bigint, text)',         'internal'),
        ('FUNCTION', 'check_quota_subject(uuid, text)',                       'internal'),
        ('FUNCTION', 'forget_quota(uuid)',                                    'internal'),
        ('FUNCTION', 'grant_lease(uuid, uuid, timestamptz, bigint, bigint, boolean)', 'internal'),
        ('FUNCTION', 'in_present_period(tollgate.quotas)',                    'internal'),
        ('FUNCTION', 'lease_holder()',                                        'internal'),
        ('FUNCTION', 'lock_quota(uuid, text)',                                'internal'),
        ('FUNCTION', 'note_user_quota()',                                     'internal'),
        ('FUNCTION', 'predecessors(uuid)',                                    'internal'),
        ('FUNCTION', 'quota_period_end(text, text, timestamptz)',             'internal'),
        ('FUNCTION', 'quota_states(uuid[])',                                  'internal'),
        ('FUNCTION', 'remembered_quota(uuid)',                                'internal'),
        ('FUNCTION', 'remembered_quotas()',                                   'internal'),
        ('FUNCTION', 'signature_of_wish(uuid, uuid, timestamptz, bigint, bigint)', 'internal'),
        ('FUNCTION', 'take_quota_wishes()',                                   'internal'),
        ('TYPE',     'audit_place',                                           'internal'),
        ('TYPE',     'memory_stats',                                          'internal'),
        ('VIEW',     'object_privileges',                                     'internal'),
        ('VIEW',     'privilege_decisions',                                   'internal')
    ) d (object_type, object, given_to);
COMMENT ON VIEW tollgate.privilege_decisions IS
    'The decision about each function, view and type of ours: given to everyone (public), to a capability, or to no role (internal). Internal: see capability_privileges';

CREATE VIEW tollgate.capability_privileges AS
    SELECT i.capability, d.object_type, d.object,
           CASE d.object_type WHEN 'FUNCTION' THEN 'EXECUTE' WHEN 'VIEW' THEN 'SELECT' WHEN 'TYPE' THEN 'USAGE' END AS privilege
    FROM tollgate.privilege_decisions d
    JOIN (VALUES ('verifier', 'verifier'),
                 ('issuer',   'issuer'), ('issuer', 'verifier'),
                 ('admin',    'admin'),  ('admin',  'issuer'), ('admin', 'verifier'),
                 ('operator', 'operator'),
                 ('key_fetcher', 'key_fetcher')) i (capability, includes) ON i.includes = d.given_to;
COMMENT ON VIEW tollgate.capability_privileges IS
    'What each capability gives: verifier verifies, authenticates, and revokes presented tokens and those of the authenticated user; issuer also creates, derives, imports, lists, rotates, disables and revokes tokens; admin also changes tokens, manages scopes, quotas, signing keys, trusted issuers, capabilities and tables of users, checks and purges the audit log, and sees all tokens, counters and daemons; operator is what the daemon needs; key_fetcher stores the keys of trusted issuers, which are fetched';

-- Names and signatures are resolved in the search path of these functions, whatever the caller's is.
CREATE FUNCTION tollgate.capability_objects(capability text) RETURNS TABLE (object_id oid, object_type text, object text, privilege text)
    LANGUAGE sql STABLE ROWS 30
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT p.object::regprocedure::oid, p.object_type, p.object::regprocedure::text, p.privilege
        FROM tollgate.capability_privileges p WHERE p.capability = $1 AND p.object_type = 'FUNCTION'
    UNION ALL
    SELECT p.object::regclass::oid, p.object_type, p.object::regclass::text, p.privilege
        FROM tollgate.capability_privileges p WHERE p.capability = $1 AND p.object_type = 'VIEW'
    UNION ALL
    SELECT p.object::regtype::oid, p.object_type, p.object::regtype::text, p.privilege
        FROM tollgate.capability_privileges p WHERE p.capability = $1 AND p.object_type = 'TYPE';
END;
COMMENT ON FUNCTION tollgate.capability_objects(text) IS 'The objects that a capability grants something on; raises if one of them does not exist. Internal.';

-- Privileges may come from a membership, or from PUBLIC. USAGE of a type is not needed to call a function. Objects of a
-- smaller capability, and those given to operators and admins alike, such as stats(), do not count as a part of a
-- capability.
CREATE FUNCTION tollgate.list_own_capabilities() RETURNS TABLE (capability text, held text, missing text[])
    LANGUAGE sql STABLE PARALLEL SAFE SECURITY DEFINER ROWS 5
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT o.capability,
           CASE WHEN bool_and(o.is_held) THEN 'whole' WHEN bool_or(o.is_held AND o.is_own) THEN 'partly' ELSE 'not' END,
           coalesce(array_agg(o.object ORDER BY o.object) FILTER (WHERE NOT o.is_held), '{}')
    FROM (
        SELECT k.place, k.capability, o.object,
               CASE WHEN k.place > 3 THEN count(*) OVER same = 1
                                 ELSE k.place = min(k.place) OVER same AND max(k.place) OVER same < 4 END AS is_own,
               CASE o.object_type WHEN 'FUNCTION' THEN has_function_privilege(a.role, o.object_id, o.privilege)
                                  ELSE has_table_privilege(a.role, o.object_id, o.privilege) END AS is_held
        FROM (SELECT tollgate.acting_role()::name) a (role),
             (VALUES (1, 'verifier'), (2, 'issuer'), (3, 'admin'), (4, 'operator'), (5, 'key_fetcher')) k (place, capability),
             LATERAL tollgate.capability_objects(k.capability) o
        WHERE o.object_type <> 'TYPE'
        WINDOW same AS (PARTITION BY o.object_type, o.object_id)
    ) o
    GROUP BY o.place, o.capability ORDER BY o.place;
END;
COMMENT ON FUNCTION tollgate.list_own_capabilities() IS
    'Which part of each capability the calling role has, itself or as a member of other roles: whole, partly, or not; and what it lacks';

CREATE VIEW tollgate.object_privileges AS
    SELECT o.object_type, o.object_id, o.object, o.owner, a.grantee, a.privilege_type AS privilege,
           -- From default privileges, set up for the role that created the object.
           EXISTS (SELECT FROM pg_default_acl d, LATERAL aclexplode(d.defaclacl) g
                   WHERE d.defaclrole = o.owner AND d.defaclnamespace IN (0, 'tollgate'::regnamespace) AND d.defaclobjtype = o.default_type
                     AND g.grantee = a.grantee)
           -- Privileges that an extension script has touched are recorded as the object's initial privileges.
           AND NOT EXISTS (SELECT FROM pg_init_privs i WHERE i.classoid = o.class_id AND i.objoid = o.object_id AND i.objsubid = 0) AS unasked
    FROM (
        SELECT 'FUNCTION', 'pg_proc'::regclass, p.oid, p.oid::regprocedure::text, p.proowner, coalesce(p.proacl, acldefault('f', p.proowner)), 'f'
            FROM pg_proc p WHERE p.pronamespace = 'tollgate'::regnamespace
        UNION ALL
        SELECT CASE c.relkind WHEN 'S' THEN 'SEQUENCE' WHEN 'v' THEN 'VIEW' ELSE 'TABLE' END, 'pg_class'::regclass, c.oid, c.oid::regclass::text,
               c.relowner, c.relacl, CASE c.relkind WHEN 'S' THEN 'S' ELSE 'r' END
            FROM pg_class c WHERE c.relnamespace = 'tollgate'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'S')
        UNION ALL
        -- Only types that are not the row type of a table or view.
        SELECT 'TYPE', 'pg_type'::regclass, t.oid, t.oid::regtype::text, t.typowner, coalesce(t.typacl, acldefault('T', t.typowner)), 'T'
            FROM pg_type t LEFT JOIN pg_class c ON c.oid = t.typrelid
            WHERE t.typnamespace = 'tollgate'::regnamespace AND t.typcategory <> 'A' AND coalesce(c.relkind, 'c') = 'c'
        UNION ALL
        SELECT 'SCHEMA', 'pg_namespace'::regclass, n.oid, quote_ident(n.nspname), n.nspowner, n.nspacl, 'n'
            FROM pg_namespace n WHERE n.nspname = 'tollgate'
    ) o (object_type, class_id, object_id, object, owner, acl, default_type), LATERAL aclexplode(o.acl) a;
COMMENT ON VIEW tollgate.object_privileges IS
    'The privileges on our objects as the catalogue has them, one row each; grantee 0 is PUBLIC. Internal: see capability_grants';
